"""The `dali` loader: image files decoded, cropped and resized by NVIDIA DALI, on the GPU where there is one.

DALI is given the bytes of every batch in our order: its own readers pad the last batch with duplicates, shuffle
with a seed of their own, and start again at the first epoch after a crash.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
from torch import Tensor

from ...errors import ConfigError, CorruptSample, LoaderDied, MissingExtra
from ..sources.folder import FolderSource
from ..sources.source import Source
from .base import Batch, LoaderOptions, Steps, Task
from .crops import Ints, central_boxes, crop_boxes
from .prefetch import Begun, Team, in_order, to_device
from .reading import SampleReader

INSTALL = "pip install 'hpc-supcon[dali]'"
_JOIN_S = 30.0  # one batch, large images on one core


class DaliLoader:
    """Loader over image files; `options.workers` of DALI's own threads live until `close()`.

    Raises ConfigError for any other source, MissingExtra without DALI.
    """

    def __init__(self, source: Source, steps: Steps, device: torch.device | str, options: LoaderOptions) -> None:
        if not isinstance(source, FolderSource):
            raise ConfigError(
                "data.loader=dali decodes image files (data.source=image_folder): choose another loader"
            )
        _import_dali()
        self._source, self._steps, self._device, self._options = source, steps, torch.device(device), options
        self._reader = SampleReader(source, steps.seed, options.crop, options.on_corrupt)
        self.steps_per_epoch = len(steps)
        self._largest_batch = steps.largest_batch
        self._gpu: int | None = None  # asked here: every thread has a current device of its own
        if self._device.type == "cuda":
            self._gpu = torch.cuda.current_device() if self._device.index is None else self._device.index
        self._pipeline: Any = None
        self._team: Team | None = None
        self._closed = False

    @property
    def replaced(self) -> int:
        return self._reader.replaced

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See Loader.epoch."""
        if self._closed:
            raise RuntimeError("this loader is closed")
        return to_device(self._serve(self._steps.of(epoch, start)), self._device)

    def _serve(self, tasks: list[Task]) -> Iterator[Batch]:
        self._end_team()
        if self._closed:
            return
        mine, team = self._steps.begin(), Team(1)
        self._team = team
        try:
            begun = (self._begin(team, *task) for task in tasks)
            for batches in in_order(begun, timeout_s=self._options.timeout_s, loader="dali"):
                yield batches[0]
                if self._closed or not self._steps.is_current(mine):
                    return
        except LoaderDied:
            team.close(0)  # the thread that hangs has been waited for
            raise
        finally:
            team.close(_JOIN_S)

    def _begin(self, team: Team, epoch: int, index: Tensor) -> Begun[list[Batch]]:
        batches: list[Batch] = []
        return batches, [team.submit(lambda: batches.append(self._batch(epoch, index)))]

    def _batch(self, epoch: int, index: Tensor) -> Batch:
        """One batch; called by the thread of the team, the only one that touches the pipeline."""
        try:
            return Batch(self._decoded(epoch, index), self._source.labels[index], index)
        except (CorruptSample, RuntimeError) as error:
            # DALI says neither which image it was nor goes on after it: Pillow names it, or replaces it.
            self._pipeline, replaced, reason = None, self._reader.replaced, " ".join(str(error).split())
            images = torch.empty(len(index), *self._reader.shape, dtype=torch.uint8)
            served = torch.from_numpy(self._reader.fill(images.numpy(), epoch, index.numpy()))
            if self._reader.replaced == replaced:
                raise LoaderDied(f"data.loader=dali: a batch that Pillow decodes failed: {reason[:500]}") from error
            return Batch(images, self._source.labels[served], served)

    def _decoded(self, epoch: int, index: Tensor) -> Tensor:
        """uint8 [B, C, S, S] or [B, V, C, S, S]. Raises CorruptSample for a header, RuntimeError for the rest."""
        if self._pipeline is None:
            self._pipeline = self._build()
        files, sizes = zip(*(self._source.encoded(i) for i in index.tolist()), strict=True)
        widths, heights = np.array(sizes, dtype=np.int64).T
        boxes = self._boxes(epoch, index.numpy(), heights, widths).astype(np.float32)
        self._pipeline.feed_input("files", [np.frombuffer(file, dtype=np.uint8) for file in files])
        for view in range(boxes.shape[1]):
            start, extent = boxes[:, view, :2], boxes[:, view, 2:]
            self._pipeline.feed_input(f"start_{view}", np.ascontiguousarray(start))
            self._pipeline.feed_input(f"end_{view}", start + extent)
        views = self._pipeline.run()[0].as_tensor()
        # The tensor belongs to the pipeline, which writes the next batch into it, on a stream of its own.
        images = torch.utils.dlpack.from_dlpack(views).clone().view(len(index), *self._reader.shape)
        if self._gpu is not None:
            torch.cuda.current_stream(self._gpu).synchronize()
        return images

    def _boxes(self, epoch: int, index: Ints, heights: Ints, widths: Ints) -> Ints:
        """int64 [B, V, 4]; without crops the one central square that `fitted` takes."""
        if self._options.crop is None:
            return central_boxes(heights, widths)
        return crop_boxes(self._steps.seed, epoch, index, heights, widths, self._options.crop)

    def _build(self) -> Any:
        """A pipeline from files and boxes to uint8 [V, C, S, S], all in one go: running ahead is done here."""
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

    def close(self) -> None:
        """End DALI's threads and the one that feeds them."""
        self._closed = True
        self._end_team()
        self._pipeline = None

    def _end_team(self) -> None:
        if self._team is not None:
            self._team.close(_JOIN_S)
            self._team = None


def _import_dali() -> Any:
    try:
        from nvidia import dali
        from nvidia.dali import fn, pipeline, types  # noqa: F401  (become attributes of dali)
    except ImportError as error:
        raise MissingExtra(f"data.loader=dali needs NVIDIA DALI ({error}): {INSTALL}") from error
    return dali
