"""The losses over real ranks: values and gradients are those of one process, and invalid input fails on all ranks."""

from __future__ import annotations

from functools import partial
from itertools import product
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from hpc_supcon import losses
from hpc_supcon.distributed import collectives
from hpc_supcon.errors import LossInputError
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


def _value_and_gradients(loss, x, labels, columns):
    x = x.clone().requires_grad_()
    loss.double()
    queue = _queue() if "queue" in columns else None
    value = loss(x, labels, queue=queue, keys=x.detach().roll(1, -1) if "keys" in columns else None)
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
                for columns in ("batch", "queue", "keys", "keys and queue"):
                    yield f"{backend} {name} V={views} {columns}", make, views, classes, columns


def _all_cases(rank, world_size):
    results = {}
    for key, make, views, classes, columns in _cases():
        x, labels = _shards(world_size, classes, views)[rank]
        results[key] = _value_and_gradients(make(), x, labels, columns)
    return results


def _compare(world_size):
    per_rank = run_ranks(_all_cases, world_size)
    for key, make, views, classes, columns in _cases():
        shards = _shards(world_size, classes, views)
        x, labels = (torch.cat(part) for part in zip(*shards, strict=True))
        value, grad, extra, stats = _value_and_gradients(make(), x, labels, columns)
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


def _triton_makers():
    return {
        "out": partial(losses.SupConLoss, 0.1),
        "in": partial(losses.SupConLoss, 0.2, form="in"),
        "tcl": partial(losses.TCLLoss, 0.1, k1=50.0, k2=1.5, learnable_temperature=True),
        "simclr": partial(losses.SimCLRLoss, 0.5),
        "statistics": _OfStatistics,
    }


class _OfStatistics(torch.nn.Module):
    """A formula that the kernels do not have: of the statistics, as anyone writes one."""

    def __init__(self, **options):
        super().__init__()
        self.options, self.stats = options, {}

    def forward(self, x, labels, queue=None):
        stats = losses.pairwise_stats(x, labels, 0.1, queue=queue, **self.options)
        per_anchor = stats.log_neg - stats.mean_pos
        return losses.global_mean(per_anchor, stats.valid, gather=self.options["gather"])


TRITON = {"backend": "triton", "precision": "bf16"}
D_TRITON = 20  # not the number of columns that the kernels compute, so that what travels is not what they read


def _triton_shards(world_size):
    generator = torch.Generator().manual_seed(4)
    shards = []
    for labels in [[0, 0, 1, 7, 2], [1, 2, 2, 2, 2, 2, 0, 5], []][:world_size]:  # the third has no rows
        x = torch.randn(len(labels), V, D_TRITON, generator=generator) + torch.randn(D_TRITON, generator=generator)
        shards.append((x, torch.tensor(labels, dtype=torch.int64)))
    past = torch.randn(9, D_TRITON, generator=generator), torch.tensor([0, 1, 8, 2, 0, 5, 5, 7, 1])
    return shards, past


def _triton_results(x, labels, past, gather):
    """Of every loss, without and with a queue: value, gradient, that of the temperature, statistics and operands."""
    from hpc_supcon.losses.triton_backend import TritonBackend

    operands, seen, results = TritonBackend.operands, [], {}

    def recorded(*args):
        seen.append(operands(*args))
        return seen[-1]

    with mock.patch.object(TritonBackend, "operands", recorded):
        for (name, make), queue in product(_triton_makers().items(), (None, past)):
            if queue is not None and name in ("out", "in"):
                continue  # the interpreter takes its time
            own, module = x.clone().requires_grad_(), make(gather=gather, **TRITON)
            value = module(own, labels, queue=queue)
            value.backward()
            extra = [p.grad for p in module.parameters()]
            stats = {key: float(number) for key, number in module.stats.items()}
            results[name, queue is not None] = value.detach(), own.grad, extra, stats, seen[-1].u
    return results


def _triton_of_ranks(rank, world_size):
    """The results of the rank's rows; on rank 0, those of all rows in this process; and the bytes of one step."""
    shards, past = _triton_shards(world_size)
    expected = None
    if rank == 0:
        expected = _triton_results(*(torch.cat(part) for part in zip(*shards, strict=True)), past, gather=False)
    x, labels = torch.randn(10, V, D_TRITON, requires_grad=True), torch.arange(10) % 3
    step = losses.SupConLoss(0.1, validate=False, **TRITON)
    sent = _bytes_sent(lambda: step(x, labels, rows_per_rank=[10 * V] * world_size).backward())
    return _triton_results(*shards[rank], past, gather=True), sent, expected


@pytest.mark.parametrize("world_size", [2, 3])
def test_with_triton_values_and_gradients_of_ranks_are_those_of_one_process(world_size):
    pytest.importorskip("triton")
    ranks = run_ranks(_triton_of_ranks, world_size, environment={"TRITON_INTERPRET": "1"})
    for key, (value, grad, extra, stats, u) in ranks[0][2].items():
        # A formula of one's own is divided by the number of anchors before the weights of pairs are rounded to bf16.
        close = 1 / 256 if key[0] == "statistics" else 1e-5
        for results, _, _ in ranks:
            torch.testing.assert_close(results[key][0], value, rtol=2e-6, atol=1e-6)
            assert results[key][3] == pytest.approx(stats, rel=1e-12), key
            assert torch.equal(results[key][4], u), key  # rounded once, and the same bits everywhere
        got = torch.cat([results[key][1] for results, _, _ in ranks]) / world_size
        torch.testing.assert_close(got, grad, rtol=0, atol=close * float(grad.abs().max()), msg=str(key))
        for index, wanted in enumerate(extra):
            mean = sum(results[key][2][index] for results, _, _ in ranks) / world_size
            torch.testing.assert_close(mean, wanted, rtol=1e-5, atol=1e-6, msg=str(key))
    for _, (rows_and_labels, sums, weights), _ in ranks:
        assert rows_and_labels == 10 * V * (2 * D_TRITON + 8)  # bf16, and one int64
        assert sums == 4 * 8
        assert weights == 10 * V * 4 * 4


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


def test_rows_of_any_dtypes_arrive_together_as_they_do_alone(two_ranks):
    for result in two_ranks:
        assert all(result["together"])


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
