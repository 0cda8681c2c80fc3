"""The `dali` loader: image files decoded, cropped and resized by NVIDIA DALI, on the GPU where there is one.

DALI gets the bytes of every batch in our order: its own readers pad the last batch with duplicates, shuffle
with a seed of their own, and start again at the first epoch after a crash.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
from torch import Tensor

from ...errors import ConfigError, CorruptSample, LoaderDied, MissingExtra
from ..sources.folder import FolderSource
from ..sources.source import Source
from .base import Batch, EpochSteps, LoaderOptions
from .prefetch import DaemonThreadPool, PendingBatch, ThreadedEpochs, to_device
from .sample_reader import SampleReader

INSTALL = "pip install 'hpc-supcon[dali]'"
_JOIN_S = 30.0  # one batch, large images on one core


class DaliLoader:
    """Loader over image files; `options.workers` of DALI's own threads, which end with `close()`.

    Raises ConfigError for any other source, MissingExtra without DALI.
    """

    def __init__(self, source: Source, steps: EpochSteps, device: torch.device | str, options: LoaderOptions) -> None:
        if not isinstance(source, FolderSource):
            raise ConfigError(
                "data.loader=dali decodes image files (data.source=image_folder): choose another loader"
            )
        _import_dali()
        self._source, self._device, self._options = source, torch.device(device), options
        self._reader = SampleReader(source, steps.seed, options.crop, options.on_corrupt)
        self.steps_per_epoch = len(steps)
        self._largest_batch = steps.largest_batch
        self._gpu: int | None = None  # read here: every thread has a current device of its own
        if self._device.type == "cuda":
            self._gpu = torch.cuda.current_device() if self._device.index is None else self._device.index
        self._pipeline: Any = None
        # one thread, the only one that uses the pipeline
        self._epochs = ThreadedEpochs(
            "dali",
            steps,
            self._start,
            threads=1,
            timeout_s=options.timeout_s,
            join_s=_JOIN_S,
            device=self._device,
        )

    @property
    def replaced(self) -> int:
        return self._reader.replaced

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See Loader.epoch."""
        return to_device(self._epochs.epoch(epoch, start), self._device)

    def close(self) -> None:
        """End DALI's threads and the one that feeds them."""
        self._epochs.close()
        self._pipeline = None

    def _start(self, pool: DaemonThreadPool, epoch: int, index: Tensor) -> PendingBatch:
        batch = pool.submit(partial(self._batch, epoch, index))
        return batch.result, [batch]

    def _batch(self, epoch: int, index: Tensor) -> Batch:
        try:
            return Batch(self._decoded(epoch, index), self._source.labels[index], index)
        except (CorruptSample, RuntimeError) as error:
            # DALI neither names the image nor can its pipeline be used again: Pillow names it, or replaces it.
            self._pipeline, replaced, reason = None, self._reader.replaced, " ".join(str(error).split())
            images = torch.empty(len(index), *self._reader.shape, dtype=torch.uint8)
            loaded = torch.from_numpy(self._reader.fill(images.numpy(), epoch, index.numpy()))
            if self._reader.replaced == replaced:
                raise LoaderDied(f"data.loader=dali: a batch that Pillow decodes failed: {reason[:500]}") from error
            return Batch(images, self._source.labels[loaded], loaded)

    def _decoded(self, epoch: int, index: Tensor) -> Tensor:
        """uint8 [B, C, S, S] or [B, V, C, S, S]. Raises CorruptSample for a header, RuntimeError for the rest."""
        if self._pipeline is None:
            self._pipeline = self._build()
        files, sizes = zip(*(self._source.encoded(i) for i in index.tolist()), strict=True)
        widths, heights = np.array(sizes, dtype=np.int64).T
        boxes = self._reader.boxes(epoch, index.numpy(), heights, widths).astype(np.float32)
        self._pipeline.feed_input("files", [np.frombuffer(file, dtype=np.uint8) for file in files])
        for view in range(boxes.shape[1]):
            start, extent = boxes[:, view, :2], boxes[:, view, 2:]
            self._pipeline.feed_input(f"start_{view}", np.ascontiguousarray(start))
            self._pipeline.feed_input(f"end_{view}", start + extent)
        views = self._pipeline.run()[0].as_tensor()
        # The tensor belongs to the pipeline, which writes the next batch into it, on a stream of its own.
        images = torch.utils.dlpack.from_dlpack(views).clone().view(len(index), *self._reader.shape)
        if self._gpu is not None:
            torch.cuda.current_stream(self._gpu).synchronize()  # this thread's own, not that of the training step
        return images

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
            images = fn.decoders.image(files, device="cpu" if self._gpu is None else "mixed", output_type=colors)
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
