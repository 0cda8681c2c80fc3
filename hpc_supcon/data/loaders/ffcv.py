"""The `ffcv` loader: .beton files, decoded by FFCV's C library in threads that do not hold Python's GIL.

FFCV's format and its JPEG decoder are used, in a loop of our own. FFCV's Loader drops the decoder's return code (a
corrupt image shows the pixels of an earlier one), waits forever when its thread fails, yields one view per decode,
and sets torch's number of threads. FFCV's resizer, OpenCV's area filter, is neither bilinear nor antialiased where a
side is enlarged.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from ctypes import c_bool, c_uint32, c_uint64, c_void_p
from functools import lru_cache, partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from ...errors import ConfigError, MissingExtra
from ..sources.beton import JPEG, BetonSource
from ..sources.source import Source
from .base import Batch, EpochSteps, LoaderOptions, count_replaced, served
from .prefetch import DaemonThreadPool, PendingBatch, ThreadedEpochs, to_device
from .sample_reader import SampleReader

INSTALL = "apt-get install pkg-config libopencv-dev libturbojpeg0-dev g++ && pip install 'hpc-supcon[ffcv]'"
_JOBS_PER_THREAD = 2  # images differ in size: with one job per thread, all would wait for the slowest
_JOIN_S = 5.0  # a job takes milliseconds


class FfcvLoader:
    """Loader over a BetonSource; `options.workers` threads, started with every epoch.

    Boxes and filter are those of every other loader; FFCV's JPEG decoder takes the fast transform, whose pixels
    differ by a few levels from Pillow's. What it refuses is decoded by Pillow.

    Raises ConfigError for any other source, MissingExtra without FFCV.
    """

    def __init__(self, source: Source, steps: EpochSteps, device: torch.device | str, options: LoaderOptions) -> None:
        if not isinstance(source, BetonSource):
            raise ConfigError(
                "data.loader=ffcv reads .beton files: make one with `hpc-supcon convert DATA OUT.beton`"
            )
        self._kernel = _decoder()
        self._source, self._device, self._options = source, device, options
        self._reader = SampleReader(source, steps.seed, options.crop, options.on_corrupt)
        self.steps_per_epoch, self.replaced = len(steps), 0
        self._epochs = ThreadedEpochs(
            "ffcv", steps, self._start, threads=options.workers, timeout_s=options.timeout_s, join_s=_JOIN_S
        )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See Loader.epoch."""
        return to_device(self._epochs.epoch(epoch, start), self._device)

    def close(self) -> None:
        """End the threads of an epoch in progress."""
        self._epochs.close()

    def _start(self, pool: DaemonThreadPool, epoch: int, index: torch.Tensor) -> PendingBatch:
        source, columns = self._source, self._source.columns
        rows = source.rows[index.numpy()]
        heights, widths = (columns[name][rows].astype(np.int64) for name in ("height", "width"))
        boxes = self._reader.boxes(epoch, index.numpy(), heights, widths)
        images, loaded = self._empty(len(index)), index.clone()
        failed = np.zeros(len(index), dtype=np.uint8)
        memory = images if images.is_contiguous() else images.movedim(2, -1)
        out, (channels, size) = memory.view(len(index), -1).numpy(), self._reader.shape[-3:-1]
        arrays = (columns["mode"], columns["height"], columns["width"], columns["ptr"], columns["size"])
        jobs = min(_JOBS_PER_THREAD * self._options.workers, len(index))
        edges = np.linspace(0, len(index), jobs + 1).astype(np.int64)

        def decode(a: int, b: int) -> None:
            shape = size, channels, memory is images
            part = rows[a:b], boxes[a:b], out[a:b], failed[a:b]
            self._kernel(source.bytes.view(np.ndarray), *arrays, *part, *shape)
            for k in (a + np.flatnonzero(failed[a:b])).tolist():
                one = slice(k, k + 1)  # Pillow decides whether it decodes
                loaded[k] = int(self._reader.fill(images[one].numpy(), epoch, index[one].numpy())[0])

        futures = [pool.submit(partial(decode, a, b)) for a, b in pairwise(edges.tolist())]
        return partial(self._finish, index, images, loaded), futures

    def _empty(self, batch: int) -> torch.Tensor:
        """The images of a batch: uint8 [B, C, S, S] or [B, V, C, S, S]."""
        if self._options.crop is None or self._source.channels == 1:
            return torch.empty(batch, *self._reader.shape, dtype=torch.uint8)
        # large: left in the layout of the decoder, which is what channels-last models take
        views, channels, size, _ = self._reader.shape
        return torch.empty(batch, views, size, size, channels, dtype=torch.uint8).movedim(-1, 2)

    def _finish(self, index: torch.Tensor, images: torch.Tensor, loaded: torch.Tensor) -> Batch:
        self.replaced += count_replaced(index, loaded)
        return served(images, self._source.labels, loaded)


def _libffcv() -> ctypes.CDLL:
    """FFCV's C library, without the Python package: importing that takes seconds, and sets torch's threads."""
    package = find_spec("ffcv")
    folders = package.submodule_search_locations or [] if package is not None else []
    files = [file for folder in folders for file in Path(folder).glob("_libffcv*.so")]
    try:
        library = ctypes.CDLL(str(files[0]))
    except (IndexError, OSError) as error:
        reason = error if files else "it is not installed"
        raise MissingExtra(f"data.loader=ffcv needs FFCV ({reason}): {INSTALL}") from error
    library.imdecode.argtypes = [c_void_p, c_uint64, c_uint32, c_uint32, c_void_p, *[c_uint32] * 6, c_bool, c_bool]
    return library


@lru_cache(maxsize=1)
def _decoder() -> Callable[..., None]:
    """The compiled decoder: decodes each image once and crops it to each of its boxes. Compiling takes seconds."""
    library = _libffcv()
    import numba  # comes with FFCV

    from .triangle_filter import copy_box, resample, to_planes

    imdecode, jpeg = library.imdecode, JPEG

    def decode(  # type: ignore[no-untyped-def]  # compiled for the types it is called with
        file, modes, heights, widths, ptrs, sizes, rows, boxes, out, failed, size, channels, planar
    ) -> None:
        """file uint8 [bytes]; modes .. sizes: [images of the file]; rows [B]; boxes [B, V, 4]; out uint8
        [B, V * channels * size * size], each view [C, S, S] where `planar`, else [S, S, C]; failed uint8 [B] becomes
        1 where the decoder reports an error."""
        largest, length = 0, channels * size * size
        for row in rows:
            largest = max(largest, np.int64(heights[row]) * np.int64(widths[row]))
        buffer = np.empty(3 * largest, np.uint8)
        scratch = np.empty((size, size, 3), np.uint8)
        for k in range(len(rows)):
            row = rows[k]
            H, W = np.int64(heights[row]), np.int64(widths[row])
            data = file[ptrs[row] : ptrs[row] + sizes[row]]
            pixels = buffer[: 3 * H * W].reshape((H, W, 3))
            if modes[row] == jpeg:
                # nonzero also for a file that ends early, whose missing rows the library fills with gray
                if imdecode(data.ctypes.data, len(data), H, W, pixels.ctypes.data, H, W, 0, 0, 1, 1, False, False):
                    failed[k] = 1
                    continue
            else:
                buffer[: 3 * H * W] = data
            for v in range(boxes.shape[1]):
                top, left, h, w = boxes[k, v]
                target = out[k, v * length : (v + 1) * length]
                view = scratch if planar else target.reshape((size, size, 3))
                if h == size and w == size:
                    copy_box(pixels, int(top), int(left), view)
                else:
                    resample(pixels, top, left, h, w, view)
                if planar:
                    to_planes(view, channels, target)

    return numba.njit(nogil=True, error_model="numpy")(decode)
