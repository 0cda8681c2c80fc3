"""The losses over real ranks: values and gradients are those of one process, and invalid input fails on all ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from hpc_supcon import losses
from hpc_supcon.distributed import collectives
from hpc_supcon.errors import LossInputError
from hpc_supcon.losses.autograd import tiled_statistics
from hpc_supcon.losses.torch_tiled import TorchTiledBackend
from hpc_supcon.losses.validation import prepare_anchors
from tests.dist.ranks import run_ranks

D, V = 6, 2
# Unequal numbers of rows, different classes on each rank, anchors without positives (class 7), a rank whose images
# have no positives at all (classes 8 and 9, one view), and a rank without rows.
CLASSES = [[0, 0, 1, 7, 2], [1, 2, 2, 2, 2, 2, 0], [8], [0, 1, 1]]
SINGLE_VIEW = [[0, 0, 1, 7], [1, 2, 2, 2, 2, 0], [8, 9], []]


def _shards(world_size, classes, views):
    generator = torch.Generator().manual_seed(3)
    shards = []
    for labels in classes[:world_size]:
        # Each rank's rows have another mean, so that no symmetry between ranks hides a wrong gradient.
        center = torch.randn(D, generator=generator, dtype=torch.float64)
        x = torch.randn(len(labels), views, D, generator=generator, dtype=torch.float64) + center
        shards.append((x, torch.tensor(labels, dtype=torch.int64)))
    return shards


def _makers(backend):
    return {
        "out": lambda: losses.SupConLoss(0.1, backend=backend),
        "in": lambda: losses.SupConLoss(0.2, form="in", backend=backend),
        "tcl": lambda: losses.TCLLoss(0.1, k1=50.0, k2=1.5, backend=backend, learnable_temperature=True),
        "simclr": lambda: losses.SimCLRLoss(0.5, backend=backend),
        "cold": lambda: losses.SupConLoss(0.01, backend=backend),
    }


def _value_and_gradients(loss, x, labels, queue=None):
    x = x.clone().requires_grad_()
    loss.double()
    value = loss(x, labels, queue=queue)
    value.backward()
    extra = [p.grad for p in loss.parameters()]
    return value.detach(), x.grad, extra, {k: float(v) for k, v in loss.stats.items()}


def _queue():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(5, D, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 8, 2, 0])


def _cases():
    for backend in ("reference", "tiled"):
        for name, make in _makers(backend).items():
            for views, classes in ((V, CLASSES), (1, SINGLE_VIEW)):
                if name == "simclr" and views == 1:
                    continue
                for queue in (None, _queue()):
                    yield f"{backend} {name} V={views} queue={queue is not None}", make, views, classes, queue


def _all_cases(rank, world_size):
    results = {}
    for key, make, views, classes, queue in _cases():
        x, labels = _shards(world_size, classes, views)[rank]
        results[key] = _value_and_gradients(make(), x, labels, queue)
    return results


def _compare(world_size):
    per_rank = run_ranks(_all_cases, world_size)
    for key, make, views, classes, queue in _cases():
        shards = _shards(world_size, classes, views)
        x, labels = (torch.cat(part) for part in zip(*shards, strict=True))
        value, grad, extra, stats = _value_and_gradients(make(), x, labels, queue)
        for result in per_rank:
            torch.testing.assert_close(result[key][0], value, rtol=1e-10, atol=0)
            assert result[key][3] == pytest.approx(stats, rel=1e-12), key
        # DistributedDataParallel averages: each rank's contribution divided by the number of ranks.
        got = torch.cat([result[key][1] for result in per_rank]) / world_size
        scale = float(grad.abs().max())
        torch.testing.assert_close(got, grad, rtol=1e-10, atol=1e-10 * scale, msg=key)
        for index, expected in enumerate(extra):
            mean = sum(result[key][2][index] for result in per_rank) / world_size
            torch.testing.assert_close(mean, expected, rtol=1e-10, atol=1e-12, msg=f"{key} temperature")


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_value_and_gradient_of_ranks_with_unequal_rows_equal_one_process(world_size):
    _compare(world_size)


class HalfRows(TorchTiledBackend):
    """A backend whose tiles are of bf16 products, as Triton's may be: of fp32 products of rows rounded to bf16."""

    row_dtype = torch.bfloat16

    def row_sums(self, gathered, temperature):
        assert gathered.u.dtype == torch.bfloat16
        return super().row_sums(replace(gathered, u=gathered.u.float()), temperature)

    def row_gradients(self, gathered, weights_M4, temperature):
        return super().row_gradients(replace(gathered, u=gathered.u.float()), weights_M4, temperature)


def _with_half_rows(x, labels, queue=None, rows_per_rank=None):
    """Value and gradient of SupCon out."""
    x = x.float().requires_grad_()
    anchors = prepare_anchors(x, labels, queue=queue, rows_per_rank=rows_per_rank)
    scale = torch.tensor(0.1, dtype=torch.float64).rsqrt()
    found = tiled_statistics(anchors, queue, scale, None, torch.float32, HalfRows(4), -1e30)
    _, mean_pos, log_pos, log_neg, _, valid = found
    value = losses.global_mean(torch.logaddexp(log_pos, log_neg) - mean_pos, valid)
    value.backward()
    return float(value.detach()), x.grad


def _half_rows_of_ranks(rank, world_size):
    return [_with_half_rows(*_shards(world_size, CLASSES, V)[rank], queue) for queue in (None, _half_queue())]


def _half_queue():
    past, labels = _queue()
    return past.float(), labels


def _messages_of_half_rows(rank, world_size):
    x, labels = torch.randn(10, V, D), torch.arange(10) % 3
    return _bytes_sent(lambda: _with_half_rows(x, labels, rows_per_rank=[10 * V] * world_size))


def _bytes_in_backward(rank, world_size):
    x = torch.randn(40, D * 8, requires_grad=True)
    return _bytes_sent(losses.SupConLoss(0.1, backend="tiled")(x, torch.arange(40) % 5).backward)


def _bytes_sent(call):
    """The sizes of the messages that this rank sends in `call()`, in order."""
    sent = []
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    gather, reduce = getattr(dist, name), dist.all_reduce

    def counted_gather(out, value, *args, **kwargs):
        sent.append(value.numel() * value.element_size())
        return gather(out, value, *args, **kwargs)

    def counted_reduce(value, *args, **kwargs):
        sent.append(value.numel() * value.element_size())
        return reduce(value, *args, **kwargs)

    setattr(dist, name, counted_gather)
    dist.all_reduce = counted_reduce
    try:
        call()
    finally:
        setattr(dist, name, gather)
        dist.all_reduce = reduce
    return sent


def _no_positive_on_any_rank(rank, world_size):
    results = []
    for backend in ("reference", "tiled"):
        x = torch.randn(3, D, requires_grad=True)
        loss = losses.SupConLoss(0.1, backend=backend)(x, torch.arange(3) + 10 * rank)
        loss.backward()
        results.append((float(loss.detach()), float(x.grad.abs().max())))
    return results


def _not_gathered(rank, world_size):
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(6 + rank, D, generator=generator)
    labels = torch.arange(6 + rank) % 2
    own = losses.SupConLoss(0.1, gather=False)(x, labels)
    return float(own), x, labels


def _hard_triplets(rank, world_size):
    """Of deterministic mining over the rows of all ranks: value, gradient, gradient responses, mean similarity."""
    x, labels = _shards(world_size, CLASSES, V)[rank]
    return _triplets_and_responses(x, labels)


def _triplets_and_responses(x, labels):
    x = x.clone().requires_grad_()
    value = losses.TripletLoss(2.0, mining="hard")(x, labels)
    value.backward()
    response = losses.gradient_response(x, labels, 0.1, 50.0, 1.5, tile_size=4)
    similarity = float(losses.mean_similarity(x.detach()))
    return float(value.detach()), x.grad, float(response.positives), float(response.negatives), similarity


def _error_of(rank, world_size, bad_rank, features, labels, bad_features, bad_labels):
    args = (bad_features, bad_labels) if rank == bad_rank else (features, labels)
    try:
        losses.SupConLoss(0.1)(*args)
    except LossInputError as error:
        return str(error)
    return None


def _bad_inputs(rank, world_size):
    x, y = torch.randn(4, 8), torch.tensor([0, 0, 1, 1])
    nan, inf = x.clone(), x.clone()
    nan[2, 3], inf[0, 0] = float("nan"), float("-inf")
    cases = {
        "NaN": (nan, y),
        "Inf": (inf, y),
        "length": (x, y[:3]),
        "float labels": (x, y.float()),
        "feature dimension": (torch.randn(4, 9), y),
        "feature dtype": (x.double(), y),
        "rank of the tensor": (torch.randn(4), y),
        "no labels": (x, None),
    }
    return {
        (name, bad): _error_of(rank, world_size, bad, x, y, *case)
        for name, case in cases.items()
        for bad in range(world_size)
    }


def _all_checks_in_one_process_group(rank, world_size):
    return {
        "bytes": _bytes_in_backward(rank, world_size),
        "messages": _messages_of_half_rows(rank, world_size),
        "half rows": _half_rows_of_ranks(rank, world_size),
        "together": _gathered_together(rank, world_size),
        "zero": _no_positive_on_any_rank(rank, world_size),
        "local": _not_gathered(rank, world_size),
        "triplets": _hard_triplets(rank, world_size),
        "errors": _bad_inputs(rank, world_size),
        # Last, because the process group must still work after all those errors.
        "after": float(losses.SupConLoss(0.1)(torch.ones(2, 3), torch.zeros(2, dtype=torch.int64))),
    }


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(_all_checks_in_one_process_group, 2)


def test_the_backward_pass_gathers_four_numbers_per_row(two_ranks):
    for result in two_ranks:
        assert result["bytes"] == [40 * 4 * 4]


def _gathered_together(rank, world_size):
    """Rows of several dtypes in one message, and each in its own."""
    n, found = 3 * rank, []
    dtypes = (torch.bfloat16, torch.int64, torch.float64, torch.uint8, torch.float32)
    for first, second in [(a, b) for a in dtypes for b in dtypes]:
        parts = [torch.randn(n, 3).mul(90).to(first), torch.randn(n).mul(90).to(second)]
        together = collectives.gather_rows_of(parts)
        found += [torch.equal(got, collectives.gather_rows(part)) for got, part in zip(together, parts, strict=True)]
        assert [got.dtype for got in together] == [first, second]
    return found


def test_rows_and_labels_travel_in_one_message_of_the_tiles_dtype(two_ranks):
    for result in two_ranks:
        rows_and_labels, sums, weights = result["messages"]
        assert rows_and_labels == 10 * V * (2 * D + 8)
        assert sums == 2 * 8
        assert weights == 10 * V * 4 * 4


def test_rows_of_any_dtypes_arrive_together_as_they_do_alone(two_ranks):
    for result in two_ranks:
        assert all(result["together"])


def test_values_and_gradients_of_rounded_rows_over_ranks_are_those_of_one_process(two_ranks):
    x, labels = (torch.cat(part) for part in zip(*_shards(2, CLASSES, V), strict=True))
    for index, queue in enumerate((None, _half_queue())):
        value, grad = _with_half_rows(x, labels, queue)
        assert [result["half rows"][index][0] for result in two_ranks] == pytest.approx([value, value], rel=1e-6)
        got = torch.cat([result["half rows"][index][1] for result in two_ranks]) / 2
        torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-6)


def test_without_a_positive_on_any_rank_the_loss_is_a_differentiable_zero(two_ranks):
    for result in two_ranks:
        assert result["zero"] == [(0.0, 0.0), (0.0, 0.0)]


def test_without_gather_a_rank_compares_only_its_own_rows(two_ranks):
    for result in two_ranks:
        own, x, labels = result["local"]
        assert own == pytest.approx(float(losses.SupConLoss(0.1)(x, labels)), rel=1e-6)


def test_triplets_and_responses_of_ranks_equal_one_process(two_ranks):
    x, labels = (torch.cat(part) for part in zip(*_shards(2, CLASSES, V), strict=True))
    value, grad, *numbers = _triplets_and_responses(x, labels)
    for result in two_ranks:
        assert result["triplets"][0] == pytest.approx(value, rel=1e-12)
        assert result["triplets"][2:] == pytest.approx(tuple(numbers), rel=1e-12)
    got = torch.cat([result["triplets"][1] for result in two_ranks]) / 2
    torch.testing.assert_close(got, grad, rtol=1e-10, atol=1e-12)


def test_invalid_input_on_one_rank_raises_the_same_error_on_all(two_ranks):
    first, second = (result["errors"] for result in two_ranks)
    assert first == second
    for (name, bad), message in first.items():
        assert message is not None, name
        if name.startswith("feature"):
            assert name in message
            assert "rank 0:" in message
            assert "rank 1:" in message
        else:
            assert message.startswith(f"rank {bad}: "), message
    assert two_ranks[0]["after"] == two_ranks[1]["after"]
