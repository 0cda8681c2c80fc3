"""The optimal brain surgeon: scores and changes of weights from an inverse Fisher matrix, and a block-diagonal one.

Hassibi and Stork 1992; with empirical Fisher matrices Singh and Alistarh 2020 (WoodFisher), in blocks Kurtic et al.
2022 (oBERT). All matrices here have the same functions: `product`, `diagonal` and `compensate`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..distributed.collectives import all_sum
from ..errors import NonFinite
from .fisher import Tensors

CHUNK = 2**22
"""Values of blocks that are inverted at a time, in float64."""
TOLERANCE = 1e-5
"""Of conjugate gradients, relative to the first residual."""


def removal_scores(weights: Mapping[str, Tensor], diagonal: Mapping[str, Tensor]) -> Tensors:
    """w^2 / (2 Q_ii), the estimated increase of the loss when a weight is removed and the others compensate.

    For the names in `weights`; diagonal: of the inverse Fisher matrix. 0 for a weight that was removed already.
    Raises NonFinite.
    """
    scores = {}
    for name, w in weights.items():
        scores[name] = torch.where(diagonal[name] == 0, 0, w.detach().square() / (2 * diagonal[name]))
    return finite(scores, "scores")


class BlockFisher:
    """The blocks on the diagonal of F = mean of g g^T over gradients g: those within `block` weights of one row.

    A row is the weights of one output. It is divided into the fewest blocks of one size <= `block`. With a block of 1
    it is the diagonal of F, and nothing is compensated. Memory: block x the number of weights.
    """

    def __init__(self, weights: Mapping[str, Tensor], block: int) -> None:
        """weights: by name, of the shapes [out, ...] and dtypes that gradients will have."""
        self._shapes = {name: w.shape for name, w in weights.items()}
        self._block = block
        self._sums: Tensors = {}
        for name, w in weights.items():
            count, side = _division(w.shape, block)
            self._sums[name] = torch.zeros(w.shape[0] * count, side, side, dtype=w.dtype, device=w.device)
        self._samples = 0

    def add(self, gradients: Mapping[str, Tensor]) -> None:
        """Add gradients [m, *shape] of m samples (ModelFisher.sample_gradients), or of batches as [1, *shape].

        For batches, times the square root of their number of samples (ModelFisher.gradients).
        """
        for name, sums in self._sums.items():
            g = _blocks(gradients[name], self._shapes[name], self._block).transpose(0, 1)  # [blocks, m, side]
            sums.baddbmm_(g.mT, g)
        self._samples += len(next(iter(gradients.values())))

    def memory(self) -> int:
        """Bytes of the blocks."""
        return sum(t.numel() * t.element_size() for t in self._sums.values())

    def inverse(self, damping: float, keep: Mapping[str, Tensor] | None = None) -> BlockInverse:
        """(F + damping I)^-1 of the gradients added on all ranks. Collective.

        keep: masks of the weights that are left; by default, all. The rows and columns of others are 0. Raises
        NonFinite.
        """
        samples = float(all_sum(torch.tensor(self._samples, dtype=torch.float64)))
        blocks = {}
        for name, sums in self._sums.items():
            left = (keep or {}).get(name)
            mask = None if left is None else _blocks(left[None].to(sums), left.shape, self._block)[0]
            blocks[name] = _inverse(all_sum(sums) / samples, damping, mask)
        return BlockInverse(finite(blocks, "inverse blocks"), self._shapes, self._block)


@dataclass(frozen=True)
class BlockInverse:
    """The inverse of a BlockFisher: `blocks` [blocks, side, side] by name."""

    blocks: Tensors
    shapes: Mapping[str, torch.Size]
    block: int

    def product(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """Q u."""
        found = {}
        for name, q in self.blocks.items():
            u = _blocks(tensors[name][None], self.shapes[name], self.block)[0]
            found[name] = _whole((q @ u[:, :, None])[:, :, 0], self.shapes[name])
        return found

    def diagonal(self) -> Tensors:
        """The diagonal of Q."""
        return {name: _whole(q.diagonal(dim1=1, dim2=2), self.shapes[name]) for name, q in self.blocks.items()}

    def compensate(self, weights: Mapping[str, Tensor], keep: Mapping[str, Tensor]) -> Tensors:
        """The weights after removal of those that are False in `keep`: 0 there, and the others changed to compensate.

        With E the removed weights, w - Q E (E^T Q E)^-1 E^T w: the optimal change for the set, exactly, in each
        block. For the names of the blocks; a name without a mask keeps all its weights. Raises NonFinite.
        """
        found = {}
        for name, q in self.blocks.items():
            shape, w = self.shapes[name], weights[name].detach()
            left = _mask(name, w, keep)
            removed = _blocks((~left)[None].to(w), shape, self.block)[0]
            w_blocks = _blocks(w[None], shape, self.block)[0]
            parts = zip(*(t.split(_chunk(q)) for t in (q, w_blocks, removed)), strict=True)
            change = torch.cat([_change(*part) for part in parts])
            found[name] = torch.where(left, w - _whole(change, shape), 0)
        return finite(found, "compensated weights")


def solve_removed(
    product: Callable[[Tensor], Tensor], w: Tensor, removed: Tensor, diagonal: Tensor, iterations: int
) -> Tensor:
    """x of (E^T Q E) x = w for the entries E that are True in `removed`, by conjugate gradients; 0 elsewhere.

    product: u -> Q u. w: 0 where not removed. diagonal: of Q, the preconditioner; positive where removed.
    """
    scale = torch.where(removed, 1 / diagonal, 0)
    return _conjugate_gradients(
        lambda u: torch.where(removed, product(u), 0), torch.zeros_like(w), w, scale, iterations
    )


def improve_compensation(
    weights: Mapping[str, Tensor],
    pruned: Mapping[str, Tensor],
    keep: Mapping[str, Tensor],
    product: Callable[[Tensors], Tensors],
    preconditioner: Mapping[str, Tensor],
    *,
    damping: float,
    iterations: int = 20,
) -> Tensors:
    """Lower the quadratic model of the loss, over all weights that are left and across layers.

    With dw = result - weights, 1/2 dw^T (F + damping I) dw is minimized by conjugate gradients, while removed weights
    stay 0: with enough iterations, the optimal brain surgeon's change for the whole network. The model is that of the
    loss near `weights`. Where so much is removed that it does not hold, a lower value of it may be a higher loss.

    Args:
        weights: before removal, all parameters F is of.
        pruned: the start, for example a matrix's `compensate`: the better it is, the fewer iterations are needed.
        keep: masks, False where removed; a parameter without one keeps all its weights.
        product: u -> F u, always of the same batches, and equal on all ranks.
        preconditioner: positive, about the diagonal of (F + damping I)^-1.
        iterations: each has one product.

    Raises NonFinite.
    """
    names = list(pruned)
    left = torch.cat([_mask(name, pruned[name], keep).flatten() for name in names])
    scale = torch.cat([preconditioner[name].flatten() for name in names]) * left

    def curvature(v: Tensor) -> Tensor:
        parts = v.split([pruned[name].numel() for name in names])
        found = product({name: part.view(pruned[name].shape) for name, part in zip(names, parts, strict=True)})
        return torch.cat([found[name].flatten() for name in names]) + damping * v

    dw = torch.cat([(pruned[name] - weights[name]).flatten() for name in names])
    residual = -curvature(dw) * left
    dw = _conjugate_gradients(lambda u: curvature(u) * left, dw, residual, scale, iterations)
    parts = dw.split([pruned[name].numel() for name in names])
    changes = {name: part.view(pruned[name].shape) for name, part in zip(names, parts, strict=True)}
    found = {name: torch.where(_mask(name, pruned[name], keep), weights[name] + changes[name], 0) for name in names}
    return finite(found, "compensated weights")


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor], x: Tensor, residual: Tensor, scale: Tensor, iterations: int
) -> Tensor:
    """x where residual = b - product(x) is small, from any x and its residual; scale: the diagonal preconditioner."""
    p = z = scale * residual
    rz = (residual * z).sum()
    limit = rz * TOLERANCE**2
    for _ in range(iterations):
        if rz <= limit:
            break
        ap = product(p)
        step = rz / (p * ap).sum()
        x, residual = x + step * p, residual - step * ap
        z = scale * residual
        previous, rz = rz, (residual * z).sum()
        p = z + rz / previous * p
    return x


def _mask(name: str, like: Tensor, keep: Mapping[str, Tensor]) -> Tensor:
    return keep[name].to(like.device) if name in keep else torch.ones_like(like, dtype=torch.bool)


def finite(tensors: Tensors, what: str) -> Tensors:
    """The tensors. Raises NonFinite if one has a NaN or Inf."""
    for name, t in tensors.items():
        if not torch.isfinite(t).all():
            raise NonFinite(f"pruning: {what} of {name} are NaN or Inf: raise the damping")
    return tensors


def _division(shape: torch.Size, block: int) -> tuple[int, int]:
    """(blocks in a row, their size)"""
    columns = shape[1:].numel()
    count = -(-columns // block)
    return count, -(-columns // count)


def _blocks(tensors: Tensor, shape: torch.Size, block: int) -> Tensor:
    """[m, *shape] -> [m, rows x blocks, side], filled up with zeros."""
    count, side = _division(shape, block)
    rows = tensors.reshape(len(tensors), shape[0], -1)
    return nn.functional.pad(rows, (0, count * side - rows.shape[2])).view(len(tensors), -1, side)


def _whole(blocks: Tensor, shape: torch.Size) -> Tensor:
    """[rows x blocks, side] -> shape: the inverse of `_blocks`."""
    return blocks.reshape(shape[0], -1)[:, : shape[1:].numel()].reshape(shape)


def _chunk(blocks: Tensor) -> int:
    return max(1, CHUNK // blocks.shape[1] ** 2)


def _inverse(f: Tensor, damping: float, mask: Tensor | None) -> Tensor:
    """(F + damping I)^-1 [blocks, side, side] of F's dtype; 0 where mask [blocks, side] is."""
    found = torch.empty_like(f)
    for start in range(0, len(f), _chunk(f)):
        own = slice(start, start + _chunk(f))
        part = f[own].double()
        if mask is not None:
            part = part * mask[own, :, None] * mask[own, None, :]
        part.diagonal(dim1=1, dim2=2).add_(damping)
        factor, failed = torch.linalg.cholesky_ex(part)
        factor[failed > 0] = torch.nan  # the caller's error
        inverse = torch.cholesky_inverse(factor)
        found[own] = inverse if mask is None else inverse * mask[own, :, None] * mask[own, None, :]
    return found


def _change(q: Tensor, w: Tensor, removed: Tensor) -> Tensor:
    """Q E (E^T Q E)^-1 E^T w for blocks: q [n, side, side], w and removed (1 or 0) [n, side]."""
    wide, e = q.double(), removed.double()
    e = e * (wide.diagonal(dim1=1, dim2=2) > 0)  # those that were removed earlier have no rows in Q
    # E^T Q E, with the identity for the other entries, so that all blocks are solved at once
    system = wide * e[:, :, None] * e[:, None, :] + torch.diag_embed(1 - e)
    x = torch.linalg.solve_ex(system, (w.double() * e)[:, :, None]).result
    return (wide @ x)[:, :, 0].to(w.dtype)
