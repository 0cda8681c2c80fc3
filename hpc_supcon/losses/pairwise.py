"""A few statistics per anchor, from which every contrastive loss of this package is computed.

With z the normalized rows of all ranks and views, s_ij = z_i . z_j / temperature, P(i) the other rows of anchor i's
class and N(i) the rows of other classes, `pairwise_stats` gives the mean of s over P(i) and the logarithms of the
sums of exp(s) over P(i) and over N(i). The tiled backends sum over tiles and never store the similarity matrix. The
result is differentiable and exact over ranks: a loss needs no gradient code of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributed import collectives
from ..errors import ConfigError, MissingExtra, unknown_name
from . import torch_tiled
from .autograd import tiled_statistics
from .dense import dense_statistics
from .gathered import TRITON_MAX_DIM, has_triton, normalize_rows
from .precision import PRECISIONS, tile_precision
from .temperature import FP32_TEMPERATURE, at_least, check_temperature
from .validation import Anchors, Queue, prepare_anchors

BACKENDS = ("auto", "reference", "tiled", "triton")
# Numbers of columns up to which the dense backend is the fastest. On CUDA the Triton kernels need many rows to fill
# the device, and the tiled backend waits for it.
_SMALL_ON_CPU, _SMALL_ON_CUDA = 128, 1023


@dataclass(frozen=True)
class PairwiseStats:
    """For each anchor of this rank, [N] in the order of the features (an image's views adjacent), differentiable.

    n_pos     |P(i)|
    mean_pos  sum over P(i) of s_ij / max(n_pos, 1)
    log_pos   log sum over P(i) of exp(s_ij)
    log_neg   log sum over N(i) of exp(s_ij)
    log_inv   log sum over P(i) of exp(-z_i . z_j), no temperature; None unless asked for
    valid     n_pos > 0: the anchors over which a loss is averaged

    The logarithm of an empty sum is a large finite negative number (finfo.min / 4), so that no formula computes
    inf - inf. Computed in fp32; in fp64 for fp64 features and for temperatures below 0.025.
    """

    n_pos: Tensor
    mean_pos: Tensor
    log_pos: Tensor
    log_neg: Tensor
    log_inv: Tensor | None
    valid: Tensor


def log_zero(dtype: torch.dtype) -> float:
    """The finite number that stands for log 0."""
    return torch.finfo(dtype).min / 4


def pairwise_stats(
    features: Tensor,
    labels: Tensor | None,
    temperature: float | Tensor,
    *,
    inverse: bool = False,
    backend: str = "auto",
    gather: bool = True,
    queue: Queue | None = None,
    keys: Tensor | None = None,
    validate: bool = True,
    precision: str = "auto",
    tile_size: int = torch_tiled.TILE_SIZE,
    rows_per_rank: list[int] | None = None,
    least_temperature: float = FP32_TEMPERATURE,
) -> PairwiseStats:
    """The statistics of every anchor of this rank that contrastive losses are computed from.

    Args:
        features: [B, V, D] or [N, D] of any float dtype; they are normalized here.
        labels: integers [B] or [N]. None: the positives of a row are the other views of its image.
        temperature: a number, or a 0-dim tensor, which then receives a gradient and is never read on the host.
        inverse: compute `log_inv` too, which TCL needs.
        backend: "reference" (dense), "tiled" (PyTorch), "triton" (CUDA), or "auto".
        gather: under an initialized process group, compare with the rows of all ranks. Their numbers may differ;
            every rank must call this.
        queue: (past embeddings [Q, D], their labels [Q]), compared with every anchor but without gradient. With
            labels None they are negatives of every anchor.
        keys: of the shape of the features, such as another model's embeddings of the same views. Anchors are compared
            with the keys of all ranks, without gradient, in place of each other; never with the key of their own
            row. Not by the Triton backend.
        validate: raise for NaN and Inf in the features, which waits for the device once.
        precision: of the products of embeddings. "bf16" and "tf32" (fp32 with 10 bits of mantissa) are formats of
            the Triton backend alone, "fp32" is exact and of the other backends (for Triton, on the CPU only).
            "auto": bf16 for half-precision features and under bf16 or fp16 autocast, else tf32.
        tile_size: rows and columns of the PyTorch backend's tiles.
        rows_per_rank: the rows (images times views) of every rank, where all ranks know them. This saves a message
            and a wait for the device in every call (see `prepare_anchors`).
        least_temperature: to which a temperature that is a tensor is raised; below 0.025 all is computed in fp64.

    A new loss takes five lines. Here is decoupled contrastive learning (Yeh et al., ECCV 2022), which has no
    positives in the denominator:

        def decoupled(features, labels, temperature=0.1):
            stats = pairwise_stats(features, labels, temperature)
            per_anchor = stats.log_neg - stats.mean_pos
            return global_mean(per_anchor, stats.valid)

    Raises LossInputError for input that no loss is defined on, the same on every rank; ConfigError for an
    unknown backend or precision; MissingExtra where Triton is asked for and not installed.
    """
    call = prepare_call(
        features, labels, temperature, backend=backend, gather=gather, queue=queue, keys=keys, validate=validate,
        precision=precision, rows_per_rank=rows_per_rank, least_temperature=least_temperature,
    )  # fmt: skip
    return statistics(call, inverse=inverse, tile_size=tile_size)


@dataclass(frozen=True)
class Call:
    """The checked arguments of `pairwise_stats`, with every "auto" replaced by a choice."""

    anchors: Anchors
    queue: Queue | None
    temperature: float | Tensor
    """A tensor is 0-dim, on the features' device."""
    backend: str
    precision: str
    dtype: torch.dtype


def prepare_call(
    features: Tensor,
    labels: Tensor | None,
    temperature: float | Tensor,
    *,
    backend: str,
    gather: bool,
    queue: Queue | None,
    keys: Tensor | None,
    validate: bool,
    precision: str,
    rows_per_rank: list[int] | None,
    least_temperature: float,
) -> Call:
    """Arguments and errors as in `pairwise_stats`. Collective."""
    check_choices(backend, precision)
    least = least_temperature if isinstance(temperature, Tensor) else temperature
    check_temperature(least)
    anchors = prepare_anchors(
        features, labels, gather=gather, validate=validate, queue=queue, keys=keys, rows_per_rank=rows_per_rank
    )
    backend = choose_backend(backend, anchors, features, least, precision)
    if backend == "triton":
        precision = tile_precision(precision, features)
    if isinstance(temperature, Tensor):
        temperature = at_least(temperature.to(features.device), least)
    return Call(anchors, queue, temperature, backend, precision, compute_dtype(features, least))


def statistics(call: Call, *, inverse: bool, tile_size: int = torch_tiled.TILE_SIZE) -> PairwiseStats:
    """By the backend of the call. Collective."""
    anchors, queue, dtype = call.anchors, call.queue, call.dtype
    if call.backend == "triton":
        from .triton_loss import triton_statistics

        return PairwiseStats(*triton_statistics(call, inverse=inverse, log_zero=log_zero(dtype)))
    with torch.autocast(anchors.rows.device.type, enabled=False):
        temperature = torch.as_tensor(call.temperature, dtype=torch.float64)
        scale = temperature.rsqrt()  # the products of rows of this length are s_ij
        for_inverse = temperature if inverse else None
        exact = call.precision == "fp32"
        if call.backend == "reference":
            u_ND = normalize_rows(anchors.rows, scale, dtype)
            found = dense_statistics(
                u_ND, anchors.labels, anchors, queue, scale, for_inverse, log_zero(dtype), exact=exact
            )
            return PairwiseStats(*found, valid=found[0] > 0)
        tiled = torch_tiled.TorchTiledBackend(tile_size, exact=exact)
        return PairwiseStats(*tiled_statistics(anchors, queue, scale, for_inverse, dtype, tiled, log_zero(dtype)))


def global_mean(per_anchor: Tensor, valid: Tensor, *, gather: bool = True) -> Tensor:
    """Mean of per_anchor [n] over the valid anchors of all ranks, 0-dim of its dtype: the same value on every rank.

    The gradient is world_size / (valid anchors of all ranks) per valid anchor: DistributedDataParallel averages
    gradients over ranks, and the average is then the gradient of one process that has all rows. Without a valid
    anchor on any rank the result is a differentiable zero. Every rank must call this, even without valid anchors.
    """
    value, _ = mean_and_sums(per_anchor, valid, [], gather=gather)
    return value


def mean_and_sums(
    per_anchor: Tensor, valid: Tensor, extra: list[Tensor], *, gather: bool = True
) -> tuple[Tensor, list[Tensor]]:
    """`global_mean`, and the sums over ranks of [valid anchors, *extra] from the same message."""
    local = torch.where(valid, per_anchor, 0.0).sum()
    parts = torch.stack([part.detach().double() for part in (local, valid.sum(), *extra)])
    ranks = collectives.world_size() if gather else 1
    total, *sums = (collectives.all_sum(parts) if gather else parts).unbind()
    count = sums[0].clamp(min=1)
    scaled = local * (ranks / count)  # float64, as `count` is
    # The value is that of all ranks, the gradient that of this rank's anchors.
    return (total / count).to(local.dtype) + (scaled - scaled.detach()).to(local.dtype), sums


def compute_dtype(features: Tensor, tau: float) -> torch.dtype:
    """fp32; fp64 for fp64 features and where sums of exp(1 / tau) leave the range of fp32."""
    return torch.float64 if features.dtype == torch.float64 or tau < FP32_TEMPERATURE else torch.float32


def choose_backend(backend: str, anchors: Anchors, features: Tensor, tau: float, precision: str = "auto") -> str:
    """The backend to use, with "auto" replaced by a choice. Raises ConfigError, MissingExtra.

    The choice must be the same on every rank, because the backends use different collectives: it depends on the
    sizes of all ranks, not on this rank's.
    """
    columns = sum(anchors.rows_per_rank) + anchors.queue_rows
    fits_triton = features.dtype != torch.float64 and tau >= FP32_TEMPERATURE and features.shape[-1] <= TRITON_MAX_DIM
    if backend == "triton" and not fits_triton:
        raise ConfigError(
            f"backend 'triton' needs fp32, bf16 or fp16 features of at most {TRITON_MAX_DIM} dimensions and a "
            f"temperature of at least {FP32_TEMPERATURE}; got {features.dtype}, {features.shape[-1]}, {tau}; use "
            "'tiled'"
        )
    exact_on_cuda = precision == "fp32" and features.is_cuda
    if backend == "triton" and exact_on_cuda:
        raise ConfigError(
            "precision 'fp32' with backend 'triton': its kernels multiply on tensor cores, which have no fp32; "
            "use precision 'tf32', or backend 'tiled' for exact products"
        )
    if backend == "triton" and anchors.keys is not None:
        raise ConfigError("backend 'triton' has no keys of another model: use 'tiled' or 'auto'")
    if backend == "triton" and not has_triton():
        raise MissingExtra("backend 'triton' needs the package triton: pip install triton")
    if backend != "auto":
        return backend
    if columns <= (_SMALL_ON_CUDA if features.is_cuda else _SMALL_ON_CPU):
        return "reference"
    fits_triton = fits_triton and features.is_cuda and not exact_on_cuda and anchors.keys is None
    return "triton" if fits_triton and has_triton() else "tiled"


def check_choices(backend: str, precision: str = "auto") -> None:
    """ConfigError, with the list of names, for a backend or precision that does not exist."""
    if backend not in BACKENDS:
        raise ConfigError(unknown_name("backend", backend, BACKENDS))
    if precision not in PRECISIONS:
        raise ConfigError(unknown_name("precision", precision, PRECISIONS))
