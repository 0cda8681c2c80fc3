"""Every rank gets a GPU of its own, however a scheduler shares them out, or all ranks raise the same error."""

from __future__ import annotations

import pytest
import torch

from hpc_supcon.distributed import devices
from hpc_supcon.distributed.devices import choose_device, device_indices
from hpc_supcon.errors import ConfigError, LaunchError

ALL = ["g0", "g1", "g2", "g3"]
OTHER_NODE = ["h0", "h1", "h2", "h3"]

# how GPUs are seen by the ranks: (the view of each rank, the index that each takes in its own view)
SEEN = {
    "all see all": ([ALL] * 4, [0, 1, 2, 3]),
    "all see all, on two nodes": ([ALL] * 4 + [OTHER_NODE] * 4, [0, 1, 2, 3] * 2),
    "ranks dealt to the nodes in turn": ([ALL, OTHER_NODE] * 2, [0, 0, 1, 1]),
    "each sees its own (--gpu-bind=closest, --gpus-per-task=1)": ([[gpu] for gpu in ALL], [0, 0, 0, 0]),
    "two tasks share a view of two": ([ALL[:2], ALL[:2], ALL[2:], ALL[2:]], [0, 1, 0, 1]),
    "views in turn": ([ALL[:2], ALL[2:], ALL[:2], ALL[2:]], [0, 0, 1, 1]),
    "more GPUs than ranks": ([ALL] * 2, [0, 1]),
    "views that overlap": ([["g0", "g1"], ["g1", "g2"], ["g2", "g0"]], [0, 0, 0]),
    "a lower rank moves for one that sees fewer": ([["g0", "g1"], ["g0"]], [1, 0]),
    "two move": ([["g0", "g1", "g2"], ["g0", "g1"], ["g0"]], [2, 1, 0]),
    "a node that binds GPUs, and one that does not": ([["g0"], ["g1"], *[OTHER_NODE] * 2], [0, 0, 0, 1]),
    "one GPU, two ranks": ([["g0"], ["g0"]], [0, None]),
    "three ranks see the same two": ([ALL[:2]] * 3 + [ALL[2:]], [0, 1, None, 0]),
    "one sees none": ([["g0"], []], [0, None]),
}  # fmt: skip


@pytest.mark.parametrize("case", SEEN)
def test_each_rank_takes_a_gpu_that_no_other_has(case):
    views, expected = SEEN[case]
    assert device_indices(views) == expected
    taken = [view[i] for view, i in zip(views, expected, strict=True) if i is not None]
    assert len(set(taken)) == len(taken)


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize("case", SEEN)
def test_every_rank_gets_its_device_or_all_the_same_error(case, name):
    views, expected = SEEN[case]
    if None not in expected:
        found = [choose_device(name, rank, views) for rank in range(len(views))]
        assert found == [torch.device("cuda", index) for index in expected]
        return
    messages = set()
    for rank in range(len(views)):
        with pytest.raises(LaunchError) as caught:
            choose_device(name, rank, views)
        messages.add(str(caught.value))
    (message,) = messages
    assert f"rank {expected.index(None)} " in message


def test_the_error_counts_the_gpus_and_the_ranks_that_see_them():
    with pytest.raises(LaunchError, match="rank 2 has no GPU of its own: 2 visible to it, for 3 ranks that see them"):
        choose_device("cuda", 0, SEEN["three ranks see the same two"][0])
    with pytest.raises(LaunchError, match=r"rank 1 sees no GPU, but rank 0 does.*runtime\.device=cpu"):
        choose_device("auto", 0, SEEN["one sees none"][0])


def test_without_any_gpu_auto_is_the_cpu_and_cuda_is_refused():
    assert choose_device("auto", 1, [[], []]) == torch.device("cpu")
    assert choose_device("cpu", 1, [ALL, ALL]) == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"runtime\.device"):
        choose_device("cuda", 1, [[], []])


def test_a_gpu_is_told_by_its_uuid_not_by_its_number(monkeypatch):
    class Properties:
        def __init__(self, i):
            self.uuid = f"uuid {i}"

    monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(devices.torch.cuda, "get_device_properties", Properties)
    assert devices.own_view("auto") == ["uuid 0", "uuid 1"]
    assert devices.own_view("cpu") == []
    assert choose_device("auto") == torch.device("cuda", 0)
