"""What all ranks must have in common is compared before anything else happens, through the store of the launch.

The store and not a collective: ranks that were started differently may have no collective in common (another device,
another command), and would wait for each other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from .. import errors
from ..errors import HpcSupconError, RankLost, RanksDiffer
from .collectives import gather_objects

READ_TIMEOUT_S = 10.0
"""How long rank 0, which may host the store, waits for the others to read why they end."""
GOOD, BAD = "+", "-"
"""What the digest of a rank begins with that can start, and of one that cannot."""
SHOWN = 4
"""Settings, and ranks with a value of their own, that are named where more differ."""


def compare_ranks(
    store: Any,
    rank: int,
    world_size: int,
    facts: Mapping[str, str],
    *,
    timeout_s: float,
    error: HpcSupconError | None = None,
) -> None:
    """Compare `facts` (name -> value, as text) with those of all other ranks; each rank calls this once.

    error: why this rank cannot start, in place of its facts. Raises, the same on every rank: the error of the lowest
    rank that has one; RanksDiffer naming what differs and where. Raises RankLost when a rank does not come.
    """
    # a store may serve several commands, one after the other
    nth = (store.add("hpc_supcon/starts", 1) - 1) // world_size
    facts_of, digests, read = (
        [f"hpc_supcon/start/{nth}/{key}/{r}" for r in range(world_size)] for key in ("facts", "digest", "read")
    )
    text = json.dumps(dict(facts) if error is None else [type(error).__name__, str(error)])
    store.set(facts_of[rank], text)
    store.set(digests[rank], f"{GOOD if error is None else BAD}{hashlib.sha256(text.encode()).hexdigest()}")
    if not _wait(store, digests, timeout_s):
        missing = [str(r) for r, key in enumerate(digests) if not store.check([key])]
        raise RankLost(f"rank {rank}: no sign of rank {', '.join(missing)} within {timeout_s:g} s of the start")
    groups: dict[str, list[int]] = {}
    for r, digest in enumerate(store.multi_get(digests)):
        groups.setdefault(digest.decode(), []).append(r)
    bad = [ranks for digest, ranks in groups.items() if digest.startswith(BAD)][:1]
    if len(groups) == 1 and not bad:
        return
    shown = bad or list(groups.values())[: SHOWN + 1]  # a store of thousands of ranks is not asked for all
    found = [json.loads(store.get(facts_of[ranks[0]])) for ranks in shown]
    store.set(read[rank], "")
    if rank == 0:
        _wait(store, read, READ_TIMEOUT_S)
    if bad:
        kind, message = found[0]
        raise getattr(errors, kind, HpcSupconError)(message if len(groups) == 1 else f"{_ranks(shown[0])}: {message}")
    others = len(groups) - len(shown)
    more = f"; ranks with {others} other combinations are not shown" if others else ""
    raise RanksDiffer(
        f"{describe_differences(shown, found)}{more}; start all ranks with the same command, settings and versions"
    )


def _wait(store: Any, keys: list[str], timeout_s: float) -> bool:
    """Whether all keys are set in time."""
    try:
        store.wait(keys, timedelta(seconds=timeout_s))
    except RuntimeError:  # DistStoreError, of a timeout or of a store that is gone
        return False
    return True


def describe_differences(groups: list[list[int]], facts: list[dict[str, str]]) -> str:
    """What differs between groups of ranks, each of which has the same facts: "rank 1 has seed=1, rank 0 has seed=0"
    and so on for every fact. groups[0] has rank 0."""
    names = [name for name in dict.fromkeys(n for one in facts for n in one) if len({f.get(name) for f in facts}) > 1]
    parts = []
    for name in names[:SHOWN]:
        ranks_of: dict[str | None, list[int]] = {}
        for ranks, one in zip(groups, facts, strict=True):
            ranks_of.setdefault(one.get(name), []).extend(ranks)
        first, *others = [f"{_ranks(ranks)} {_has(ranks)} {_value(name, v)}" for v, ranks in ranks_of.items()]
        parts.append(", ".join([*others, first]))
    more = [f"and {len(names) - SHOWN} more settings"] * (len(names) > SHOWN)
    return "; ".join([*parts, *more])


def _ranks(ranks: list[int]) -> str:
    shown = [str(rank) for rank in sorted(ranks)]
    listed = ", ".join(shown if len(shown) <= SHOWN else [*shown[:SHOWN], f"and {len(shown) - SHOWN} more"])
    return f"rank{'s' * (len(shown) > 1)} {listed}"


def _has(ranks: list[int]) -> str:
    return "has" if len(ranks) == 1 else "have"


def _value(name: str, value: str | None) -> str:
    return f"no {name}" if value is None else f"{name}={value}"


def ranks_that_differ(value: object) -> list[int]:
    """The ranks whose `value` (small, comparable) is not that of rank 0. Collective, and the same on every rank."""
    values = gather_objects(value)
    return [rank for rank, other in enumerate(values) if other != values[0]]
