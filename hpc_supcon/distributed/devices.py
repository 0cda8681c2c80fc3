"""Which device is a rank's own: GPUs are counted as each rank sees them, over all ranks of the run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import ConfigError, LaunchError

View = Sequence[str]
"""The GPUs that one process sees, in its order: an identity of each that is the same in every process (its UUID)."""


def own_view(name: str) -> list[str]:
    """What this process sees of the GPUs, none where `runtime.device` is cpu."""
    if name == "cpu" or not torch.cuda.is_available():
        return []
    return [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]


def device_indices(views: Sequence[View]) -> list[int | None]:
    """For each rank, the index in its own view of the GPU that it takes; None where none is left for it.

    Every rank takes the first GPU it sees that no lower rank has; lower ranks move where that lets one more have a
    GPU of its own. So it does not matter how a scheduler shares them out: where all ranks of a node see all GPUs,
    they get 0, 1, 2 ...; where each sees only its own, all get 0. A pure function, the same on every rank.
    """
    owner: dict[str, int] = {}

    def take(rank: int, tried: set[str]) -> bool:
        for gpu in views[rank]:
            if gpu not in owner:
                owner[gpu] = rank
                return True
        for gpu in views[rank]:
            if gpu not in tried:
                tried.add(gpu)
                if take(owner[gpu], tried):
                    owner[gpu] = rank
                    return True
        return False

    for rank in range(len(views)):
        take(rank, set())
    taken = {rank: gpu for gpu, rank in owner.items()}
    return [list(view).index(taken[rank]) if rank in taken else None for rank, view in enumerate(views)]


def choose_device(name: str, rank: int = 0, views: Sequence[View] | None = None) -> torch.device:
    """The device of `rank` for `runtime.device`: auto, cpu or cuda. Raises ConfigError or LaunchError.

    views: of all ranks, in rank order; None for a single process. With them, all ranks raise the same error.
    """
    views = [own_view(name)] if views is None else views
    seeing = [r for r, view in enumerate(views) if view]
    if name == "cpu" or (name == "auto" and not seeing):
        return torch.device("cpu")
    if not seeing:
        raise ConfigError("runtime.device is cuda, but PyTorch sees no CUDA device; use runtime.device=auto or cpu")
    indices = device_indices(views)
    without = next((r for r, index in enumerate(indices) if index is None), None)
    if without is not None and not views[without]:
        raise LaunchError(
            f"rank {without} sees no GPU, but rank {seeing[0]} does: give each task a GPU, or set runtime.device=cpu"
        )
    if without is not None:
        gpus = set(views[without])
        sharing = sum(not gpus.isdisjoint(view) for view in views)
        raise LaunchError(
            f"rank {without} has no GPU of its own: {len(gpus)} visible to it, for {sharing} ranks that see them; "
            "start one task for each GPU"
        )
    index = indices[rank]
    assert index is not None
    return torch.device("cuda", index)
