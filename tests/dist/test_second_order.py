"""The learned inverse Fisher matrix and block-diagonal ones on several ranks: one matrix, that of all ranks' data."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call

from hpc_supcon.pruning import BlockFisher, Categorical, InverseFisher, ModelFisher
from tests.dist.ranks import run_ranks

ROWS = 12


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def _data(index):
    """A batch for one process: sorted, so that ranks have very different parts of it."""
    x = torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(index)).double()
    return x[x[:, 0].argsort()] * torch.linspace(0.1, 3.0, ROWS).double()[:, None]


def _learn(rank, world_size, directions, warmup):
    model = _model()
    p = {name: t.detach() for name, t in model.named_parameters()}
    fisher = ModelFisher(p, lambda q, x: functional_call(model, q, (x,)), Categorical())
    inverse = InverseFisher(model, damping=0.1)
    losses = inverse.fit(
        fisher, lambda i: (_data(i).chunk(world_size)[rank], None), 6, seed=3, directions=directions, warmup=warmup
    )
    return losses, inverse.state_dict()


def _same_bits(first, second):
    return all(torch.equal(t, second[key]) for key, t in first.items())


def test_ranks_learn_what_one_process_learns_from_all_their_data():
    [(want, single)] = run_ranks(_learn, 1, "random", 0)
    results = run_ranks(_learn, 3, "random", 0)
    for losses, state in results:
        assert losses == results[0][0]
        assert _same_bits(state, results[0][1])
        assert losses == pytest.approx(want, rel=1e-9)
        for key, t in state.items():
            if key.startswith("Q/"):
                torch.testing.assert_close(t, single[key], rtol=1e-7, atol=1e-9)


def test_targets_are_drawn_by_every_rank_for_itself_and_q_is_the_same():
    first, second = run_ranks(_learn, 2, "fisher", 2)
    assert first[0] == second[0]
    assert _same_bits(first[1], second[1])


def _warmed_up(rank, world_size):
    """Q after the warm-up, with the same inputs on all ranks: they differ by the targets that they draw."""
    model = _model()
    p = {name: t.detach() for name, t in model.named_parameters()}
    fisher = ModelFisher(p, lambda q, x: functional_call(model, q, (x,)), Categorical())
    inverse = InverseFisher(model, damping=0.1)
    inverse.fit(fisher, lambda i: (_data(0), None), 0, seed=3, warmup=1)
    return inverse.diagonal()


def test_the_ranks_draw_different_targets():
    [alone] = run_ranks(_warmed_up, 1)
    together, _ = run_ranks(_warmed_up, 2)
    assert any(not torch.allclose(t, alone[name]) for name, t in together.items())


def _blocks(rank, world_size):
    g = torch.randn(7, 3, 4, generator=torch.Generator().manual_seed(1)).double()
    fisher = BlockFisher({"w": g[0]}, 2)
    fisher.add({"w": g if world_size == 1 else g[:2] if rank == 0 else g[2:]})
    return fisher.inverse(0.1).blocks["w"]


def test_blocks_are_of_the_gradients_of_all_ranks():
    [want] = run_ranks(_blocks, 1)
    for got in run_ranks(_blocks, 2):
        torch.testing.assert_close(got, want)
