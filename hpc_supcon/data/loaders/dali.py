"""The `dali` loader: image files decoded, cropped and resized by NVIDIA DALI, on the GPU where there is one.

DALI gets the bytes of every batch in our order: its own readers pad the last batch with duplicates, shuffle
with a seed of their own, and start again at the first epoch after a crash.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
from torch import Tensor

from ...errors import ConfigError, CorruptSample, LoaderDied, MissingExtra
from ..sources.encoded import EncodedSource
from ..sources.folder import FolderSource
from ..sources.source import Source
from .base import Batch, EpochSteps, LoaderOptions, count_replaced, served
from .file_check import is_regular
from .prefetch import DaemonThreadPool, PendingBatch, ThreadedEpochs, to_device
from .sample_reader import SampleReader

INSTALL = "pip install 'hpc-supcon[dali]'"
_JOIN_S = 30.0  # one batch, large images on one core
_JOBS_PER_THREAD = 2  # files that Pillow decodes take longer than others
_ONE_PIXEL = b"P6 1 1 255 \0\0\0"
"""An image that DALI decodes wherever it works."""


@dataclass
class _Request:
    """The images of a batch while they are read: files for DALI, and pixels of those that only Pillow decodes."""

    epoch: int
    index: Tensor
    pixels: Tensor
    """uint8 [B, ...] on the CPU; written where there is no file."""
    loaded: Tensor
    """int64 [B]: see sample_reader.SampleReader.fill."""
    files: list[bytes | None]
    sizes: np.ndarray
    """int64 [B, 2]: height and width in pixels; 0 where there is no file."""


class DaliLoader:
    """Loader over image files; `options.workers` of DALI's own threads, which end with `close()`.

    As many threads read the files. What is not surely read by DALI as by Pillow (see file_check), and what DALI
    refuses, is decoded there by Pillow, with the boxes of every other loader.

    Raises ConfigError for any other source, MissingExtra without DALI.
    """

    def __init__(self, source: Source, steps: EpochSteps, device: torch.device | str, options: LoaderOptions) -> None:
        if not isinstance(source, FolderSource | EncodedSource):
            raise ConfigError("data.loader=dali decodes image files, which these data are not: choose another loader")
        _import_dali()
        self._source, self._device, self._options = source, torch.device(device), options
        self._reader = SampleReader(source, steps.seed, options.crop, options.on_corrupt)
        self.steps_per_epoch, self.replaced = len(steps), 0
        self._largest_batch = steps.largest_batch
        self._gpu: int | None = None  # read here: every thread has a current device of its own
        if self._device.type == "cuda":
            self._gpu = torch.cuda.current_device() if self._device.index is None else self._device.index
        self._pipeline: Any = None
        self._one_at_a_time = threading.Lock()  # held by the thread that uses the pipeline
        self._refused: set[int] = set()  # images that DALI does not decode
        # one thread more than read: it waits for them, and then for DALI
        self._epochs = ThreadedEpochs(
            "dali",
            steps,
            self._start,
            threads=options.workers + 1,
            timeout_s=options.timeout_s,
            join_s=_JOIN_S,
            device=self._device,
        )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See Loader.epoch."""
        return to_device(self._epochs.epoch(epoch, start), self._device)

    def close(self) -> None:
        """End DALI's threads and those that feed them."""
        self._epochs.close()
        self._pipeline = None

    def _start(self, pool: DaemonThreadPool, epoch: int, index: Tensor) -> PendingBatch:
        n, shape = len(index), self._reader.shape
        pixels = torch.empty(n, *shape, dtype=torch.uint8)
        request = _Request(epoch, index, pixels, index.clone(), [None] * n, np.zeros((n, 2), dtype=np.int64))
        jobs = min(_JOBS_PER_THREAD * self._options.workers, n)
        edges = np.linspace(0, n, jobs + 1).astype(np.int64).tolist()
        # in this order in the pool's queue, so that what waits for them never keeps them from a thread
        reads = [pool.submit(partial(self._read, request, range(a, b))) for a, b in pairwise(edges)]
        decoded = pool.submit(partial(self._decode, request, reads))
        return partial(self._finish, request, decoded), [*reads, decoded]

    def _read(self, request: _Request, part: range) -> None:
        """Read the files of this part of a batch. Raises as SampleReader.fill."""
        for k in part:
            request.files[k], (width, height) = self._file(int(request.index[k]))
            request.sizes[k] = height, width
            if request.files[k] is None:
                self._fill(request, k)

    def _file(self, i: int) -> tuple[bytes | None, tuple[int, int]]:
        """The bytes of an image for DALI and its (width, height); no bytes where Pillow has to decode it."""
        if i in self._refused:
            return None, (0, 0)
        try:
            data, size = self._source.encoded(i)
        except CorruptSample:
            return None, (0, 0)
        return (data, size) if is_regular(data) else (None, (0, 0))

    def _fill(self, request: _Request, k: int) -> None:
        """Image k of the batch by Pillow, or another one in its place. Raises as SampleReader.fill."""
        out, index = request.pixels[k : k + 1].numpy(), request.index[k : k + 1].numpy()
        request.loaded[k] = int(self._reader.fill(out, request.epoch, index)[0])

    def _decode(self, request: _Request, reads: Sequence[Future[None]]) -> Tensor:
        """The images of the whole batch, uint8 [B, C, S, S] or [B, V, C, S, S], on the device."""
        for read in reads:
            read.result()
        chosen = [k for k, file in enumerate(request.files) if file is not None]
        with self._one_at_a_time:
            try:
                images = self._run(request, chosen) if chosen else None
            except RuntimeError as error:
                chosen, images = self._run_singly(request, chosen, error)
            if images is None or len(chosen) < len(request.files):
                images = self._merged(request, chosen, images)
        return images

    def _run_singly(
        self, request: _Request, chosen: list[int], error: RuntimeError
    ) -> tuple[list[int], Tensor | None]:
        """(those that DALI decodes, their images), after all `chosen` together failed: DALI does not say which one.

        Pillow decodes the others, now and in later epochs. Raises LoaderDied where it was no image's fault.
        """
        accepted: dict[int, Tensor] = {}
        for k in chosen:
            with suppress(RuntimeError):
                accepted[k] = self._run(request, [k])
        if len(accepted) == len(chosen) or not (accepted or self._decodes_anything()):
            reason = " ".join(str(error).split())
            raise LoaderDied(f"data.loader=dali: DALI failed, and not because of an image: {reason[:500]}") from error
        for k in chosen:
            if k not in accepted:
                self._refused.add(int(request.index[k]))
                self._fill(request, k)
        return list(accepted), torch.cat(list(accepted.values())) if accepted else None

    def _merged(self, request: _Request, chosen: list[int], images: Tensor | None) -> Tensor:
        """The pixels by Pillow, with the images [len(chosen), ...] by DALI in their places."""
        merged = request.pixels.to(self._device)
        if images is not None:
            merged[torch.tensor(chosen, device=self._device)] = images
        self._synchronize()
        return merged

    def _run(self, request: _Request, chosen: list[int]) -> Tensor:
        """Images `chosen` of the batch, decoded by DALI. Raises RuntimeError."""
        heights, widths = request.sizes[chosen].T
        boxes = self._reader.boxes(request.epoch, request.index.numpy()[chosen], heights, widths)
        files = [file for k in chosen if (file := request.files[k]) is not None]
        return self._run_pipeline(files, boxes.astype(np.float32))

    def _run_pipeline(self, files: list[bytes], boxes: np.ndarray) -> Tensor:
        if self._pipeline is None:
            self._pipeline = self._build()
        try:
            self._pipeline.feed_input("files", [np.frombuffer(file, dtype=np.uint8) for file in files])
            for view in range(boxes.shape[1]):
                start, extent = boxes[:, view, :2], boxes[:, view, 2:]
                self._pipeline.feed_input(f"start_{view}", np.ascontiguousarray(start))
                self._pipeline.feed_input(f"end_{view}", start + extent)
            views = self._pipeline.run()[0].as_tensor()
        except RuntimeError:
            self._pipeline = None  # it cannot be used again
            raise
        # The tensor belongs to the pipeline, which writes the next batch into it, on a stream of its own.
        images = torch.utils.dlpack.from_dlpack(views).clone().view(len(files), *self._reader.shape)
        self._synchronize()
        return images

    def _decodes_anything(self) -> bool:
        box = np.array([0, 0, 1, 1], dtype=np.float32)
        views = self._reader.shape[0] if self._options.crop is not None else 1
        try:
            self._run_pipeline([_ONE_PIXEL], np.tile(box, (1, views, 1)))
        except RuntimeError:
            return False
        return True

    def _synchronize(self) -> None:
        if self._gpu is not None:
            torch.cuda.current_stream(self._gpu).synchronize()  # this thread's own, not that of the training step

    def _finish(self, request: _Request, decoded: Future[Tensor]) -> Batch:
        self.replaced += count_replaced(request.index, request.loaded)
        return served(decoded.result(), self._source.labels, request.loaded)

    def _build(self) -> Any:
        """A pipeline from files and boxes to uint8 [V, C, S, S]; without prefetching, which ThreadedEpochs does."""
        dali = _import_dali()
        fn, types = dali.fn, dali.types
        colors = types.RGB if self._source.channels == 3 else types.GRAY
        size = self._reader.shape[-1]
        pipeline = dali.pipeline.Pipeline(
            batch_size=self._largest_batch,
            num_threads=self._options.workers,
            device_id=self._gpu,
            exec_pipelined=False,
            exec_async=False,
            prefetch_queue_depth=1,
        )
        with pipeline:
            files = fn.external_source(name="files")
            images = fn.decoders.image(
                files,
                device="cpu" if self._gpu is None else "mixed",
                output_type=colors,
                adjust_orientation=False,  # the source has turned what is to be turned
            )
            resized = [
                fn.resize(
                    images,
                    size=[size, size],
                    roi_start=fn.external_source(name=f"start_{view}"),
                    roi_end=fn.external_source(name=f"end_{view}"),
                    interp_type=types.INTERP_LINEAR,
                    antialias=True,
                )
                for view in range(1 if self._options.crop is None else self._options.crop.views)
            ]
            views = fn.stack(*resized, axis=0)
            pipeline.set_outputs(fn.transpose(views, perm=[0, 3, 1, 2]))
        pipeline.build()
        return pipeline


def _import_dali() -> Any:
    try:
        from nvidia import dali
        from nvidia.dali import fn, pipeline, types  # noqa: F401  (become attributes of dali)
    except ImportError as error:
        raise MissingExtra(f"data.loader=dali needs NVIDIA DALI ({error}): {INSTALL}") from error
    return dali
