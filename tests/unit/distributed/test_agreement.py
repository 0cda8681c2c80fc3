"""Claims about the comparison of ranks at the start of a launch, on a store that threads share."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from hpc_supcon.distributed import launch
from hpc_supcon.distributed.agreement import compare_ranks
from hpc_supcon.distributed.launch import Launch
from hpc_supcon.errors import ConfigError, RankLost, RanksApart, RanksDiffer

WAIT_S = 60.0


def compared(store, facts, errors=None):
    """What each rank raises, or None."""

    def one(rank):
        try:
            error = None if errors is None else errors[rank]
            compare_ranks(store, rank, len(facts), facts[rank], timeout_s=WAIT_S, error=error)
        except Exception as raised:
            return raised
        return None

    with ThreadPoolExecutor(len(facts)) as pool:
        return list(pool.map(one, range(len(facts))))


def same(raised):
    """The message, which is the same on every rank."""
    (one,) = {(type(error), str(error)) for error in raised}
    return one


def test_ranks_with_the_same_facts_go_on():
    assert compared(dist.HashStore(), [{"seed": "1"}] * 4) == [None] * 4


def test_one_store_serves_one_command_after_the_other():
    store = dist.HashStore()
    assert compared(store, [{"seed": "1"}] * 2) == [None] * 2
    assert compared(store, [{"seed": "2"}] * 2) == [None] * 2
    assert same(compared(store, [{"seed": "2"}, {"seed": "3"}]))[0] is RanksDiffer


def test_every_rank_says_what_differs_and_where():
    facts = [{"a": "1", "b": "1", "c": "1"} for _ in range(4)]
    facts[1] |= {"b": "2"}
    facts[3] |= {"b": "2", "c": "3"}
    del facts[2]["a"]
    kind, message = same(compared(dist.HashStore(), facts))
    assert kind is RanksDiffer
    assert message.startswith(
        "rank 2 has no a, ranks 0, 1, 3 have a=1; ranks 1, 3 have b=2, ranks 0, 2 have b=1; "
        "rank 3 has c=3, ranks 0, 1, 2 have c=1; start all ranks"
    )


def test_of_many_ranks_and_settings_a_few_are_named():
    facts = [{f"s{k}": str(rank) for k in range(9)} for rank in range(12)]
    _, message = same(compared(dist.HashStore(), facts))
    assert "rank 1 has s0=1, rank 2 has s0=2, rank 3 has s0=3, rank 4 has s0=4, rank 0 has s0=0; " in message
    assert "and 5 more settings; ranks with 7 other combinations are not shown" in message
    assert "s4" not in message
    assert "\n" not in message


def test_the_error_of_one_rank_is_raised_on_all():
    errors = [None, ConfigError("seed: no"), None]
    assert same(compared(dist.HashStore(), [{}] * 3, errors)) == (ConfigError, "rank 1: seed: no")
    errors = [ConfigError("seed: no")] * 3
    assert same(compared(dist.HashStore(), [{}] * 3, errors)) == (ConfigError, "seed: no")


def test_a_rank_that_does_not_come_is_named():
    with pytest.raises(RankLost, match="rank 0: no sign of rank 1, 2 within"):
        compare_ranks(dist.HashStore(), 0, 3, {}, timeout_s=0.01)


def test_a_single_rank_is_refused_with_its_own_error():
    error = ConfigError("no")
    assert launch.refused(Launch(), error) is error
    assert not error.of_this_rank


@pytest.mark.parametrize("store", [None, dist.HashStore()])
def test_a_rank_that_is_refused_while_the_others_do_not_come_says_so_itself(monkeypatch, store):
    def meet(meeting, message, timeout_s):
        if store is None:
            raise RanksApart("rank 0 does not answer")
        return store, []

    monkeypatch.setattr(launch, "REFUSAL_TIMEOUT_S", 0.01)
    monkeypatch.setattr(launch, "meet", meet)
    error = ConfigError("no")
    assert launch.refused(Launch(rank=1, world_size=2, local_rank=1), error) is error
    assert error.of_this_rank, "printed though it is not the first rank of its node"
