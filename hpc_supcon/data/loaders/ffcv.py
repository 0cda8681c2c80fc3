"""The `ffcv` loader: .beton files, decoded by FFCV's C library in threads that do not hold Python's GIL.

FFCV's format, its JPEG decoder and its resizer are used, in a loop of our own. FFCV's Loader drops the decoder's
return code (a corrupt image shows the pixels of an earlier one), waits forever when its thread fails, yields
one view per decode, and sets torch's number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from ctypes import c_bool, c_int64, c_uint32, c_uint64, c_void_p
from functools import lru_cache, partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from ...errors import ConfigError, CorruptSample, MissingExtra
from ..sources.beton import JPEG, BetonSource
from ..sources.source import Source
from .base import Batch, EpochSteps, LoaderOptions
from .prefetch import DaemonThreadPool, PendingBatch, ThreadedEpochs, to_device
from .sample_reader import SampleReader

INSTALL = "apt-get install pkg-config libopencv-dev libturbojpeg0-dev g++ && pip install 'hpc-supcon[ffcv]'"
_JOBS_PER_THREAD = 2  # images differ in size: with one job per thread, all would wait for the slowest
_JOIN_S = 5.0  # a job takes milliseconds


class FfcvLoader:
    """Loader over a BetonSource; `options.workers` threads, started with every epoch.

    Crops have the boxes of every other loader; OpenCV's area filter gives pixels that differ by a few levels from
    those of Pillow's triangle filter.

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
        self.steps_per_epoch = len(steps)
        self._epochs = ThreadedEpochs(
            "ffcv", steps, self._start, threads=options.workers, timeout_s=options.timeout_s, join_s=_JOIN_S
        )

    @property
    def replaced(self) -> int:
        return self._reader.replaced

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
        images, out = self._empty(*boxes.shape[:2])
        failed = np.zeros(len(index), dtype=np.uint8)
        arrays = (columns["mode"], columns["height"], columns["width"], columns["ptr"], columns["size"])
        jobs = min(_JOBS_PER_THREAD * self._options.workers, len(index))
        edges = np.linspace(0, len(index), jobs + 1).astype(np.int64)
        futures = [
            pool.submit(partial(self._kernel, source.bytes.view(np.ndarray), *arrays, *part))
            for part in ((rows[a:b], boxes[a:b], out[a:b], failed[a:b]) for a, b in pairwise(edges.tolist()))
        ]
        return partial(self._finish, epoch, index, images, failed), futures

    def _empty(self, batch: int, views: int) -> tuple[torch.Tensor, np.ndarray]:
        """The images of a batch, and the same memory as the decoder writes it, [B, V, S, S, C]."""
        C, S, _ = self._reader.shape[-3:]
        if self._options.crop is None:
            images = torch.empty(batch, C, S, S, dtype=torch.uint8)
            return images, images.unsqueeze(1).movedim(2, -1).numpy()
        # large: left in the layout of the resizer, which is what channels-last models take
        pixels = torch.empty(batch, views, S, S, C, dtype=torch.uint8)
        return pixels.movedim(-1, 2), pixels.numpy()

    def _finish(self, epoch: int, index: torch.Tensor, images: torch.Tensor, failed: np.ndarray) -> Batch:
        loaded = index.clone()
        for k in np.flatnonzero(failed).tolist():
            i = int(index[k])
            if self._options.on_corrupt == "fail":
                row = int(self._source.rows[i])
                raise CorruptSample(f"{self._source.path}: sample {row} does not decode (image {i} of the set)")
            loaded[k] = self._reader.replace(images[k].numpy(), epoch, i)
        return Batch(images, self._source.labels[loaded], loaded)


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
    library.resize.argtypes = [c_int64] * 11
    library.resize.restype = None
    # Our threads resize crops in parallel; OpenCV would start more threads of its own and keep them.
    set_threads = library._ZN2cv13setNumThreadsEi  # cv::setNumThreads(int)
    set_threads.argtypes = [ctypes.c_int]
    set_threads(0)
    return library


@lru_cache(maxsize=1)
def _decoder() -> Callable[..., None]:
    """The compiled decoder: decodes each image once and crops it to each of its boxes. Compiling takes seconds."""
    library = _libffcv()
    import numba  # comes with FFCV

    imdecode, resize, jpeg = library.imdecode, library.resize, JPEG

    def decode(  # type: ignore[no-untyped-def]  # compiled for the types it is called with
        file, modes, heights, widths, ptrs, sizes, rows, boxes, out, failed
    ) -> None:
        """file uint8 [bytes]; modes .. sizes: [images of the file]; rows [B]; boxes [B, V, 4];
        out uint8 [B, V, S, S, C], of any strides; failed uint8 [B] becomes 1 where the decoder reports an error."""
        size, largest = out.shape[2], 0
        in_place = out.strides[4] == 1 and out.strides[3] == 3 and out.shape[4] == 3
        for row in rows:
            largest = max(largest, np.int64(heights[row]) * np.int64(widths[row]))
        buffer = np.empty(3 * largest, np.uint8)
        small = np.empty((size, size, 3), np.uint8)
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
                if h == size and w == size:
                    out[k, v] = pixels[top : top + h, left : left + w, : out.shape[4]]
                    continue
                target = out[k, v].ctypes.data if in_place else small.ctypes.data
                resize(0, pixels.ctypes.data, H, W, top, top + h, left, left + w, target, size, size)
                if not in_place:
                    out[k, v] = small[:, :, : out.shape[4]]

    return numba.njit(nogil=True, error_model="numpy")(decode)
