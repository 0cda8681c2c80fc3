"""The form of an inverse Fisher matrix of one layer: Q = B^T B with B u = R (A o U) L, so it is never indefinite.

U is the layer's weight as a matrix, one for each group of a convolution: [groups, out / groups, in / groups * kernel
(+ 1)], the last column being the bias. A scales each weight, L and R are square: Q u = A o (R^T R (A o U) L L^T).
The parameters of other layers (norms, embeddings) have A alone: their Q is diagonal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


@dataclass(frozen=True)
class Form:
    """How the parameters `names` (a weight and its bias, or any one parameter) are one matrix."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    groups: int = 1
    is_matrix: bool = True

    @property
    def key(self) -> str:
        return self.names[0]

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The tensors of `names` -> [groups, rows, columns]; one without factors stays as it is."""
        weight = tensors[self.names[0]]
        if not self.is_matrix:
            return weight
        matrix = weight.reshape(self.groups, weight.shape[0] // self.groups, -1)
        if len(self.names) == 1:
            return matrix
        return torch.cat([matrix, tensors[self.names[1]].reshape(self.groups, -1, 1)], dim=2)

    def unpack(self, matrix: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The inverse of `pack`: names and tensors of their own shapes."""
        if len(self.names) == 1:
            yield self.names[0], matrix.reshape(self.shapes[0])
        else:
            yield self.names[0], matrix[..., :-1].reshape(self.shapes[0])
            yield self.names[1], matrix[..., -1].reshape(self.shapes[1])


def forms(module: nn.Module, names: Iterable[str] | None = None) -> list[Form]:
    """The forms of a module's parameters, each parameter once; names: only of these."""
    wanted = set(dict(module.named_parameters()) if names is None else names)
    found: list[Form] = []
    for prefix, layer in module.named_modules():
        own = {
            key: p
            for key, p in (
                (f"{prefix}.{key}" if prefix else key, p) for key, p in layer.named_parameters(recurse=False)
            )
            if key in wanted
        }
        wanted -= own.keys()
        dot = f"{prefix}." if prefix else ""
        weight, bias = f"{dot}weight", f"{dot}bias"
        if isinstance(layer, (_ConvNd, nn.Linear)) and not isinstance(layer, _ConvTransposeNd) and weight in own:
            together = (weight, bias) if bias in own else (weight,)
            shapes = tuple(own.pop(name).shape for name in together)
            found.append(Form(together, shapes, groups=getattr(layer, "groups", 1)))
        found += [Form((name,), (p.shape,), is_matrix=False) for name, p in own.items()]
    return found


def identity(groups: int, size: int, largest: int, like: Tensor) -> Tensor:
    """A block-diagonal factor [groups, blocks, b, b], b <= largest, that is the identity [size, size].

    Where b does not divide the size, the last block is 0 beyond it, and stays so.
    """
    blocks = -(-size // largest)
    b = -(-size // blocks)
    diagonal = torch.zeros(blocks * b, dtype=like.dtype, device=like.device)
    diagonal[:size] = 1
    return torch.diag_embed(diagonal.view(blocks, b)).repeat(groups, 1, 1, 1)


def times(x: Tensor, factor: Tensor) -> Tensor:
    """x [groups, rows, size] @ a block-diagonal factor [groups, blocks, b, b]."""
    return (_in_blocks(x, factor) @ factor).transpose(-3, -2).flatten(-2)[..., : x.shape[-1]]


def outer_products(x: Tensor, factor: Tensor) -> Tensor:
    """X^T X of x [groups, rows, size], the blocks of it that the factor has."""
    parts = _in_blocks(x, factor)
    return parts.mT @ parts


def whitener(s: Tensor) -> Tensor:
    """K with K K^T the inverse of the correlation matrix of covariances s [groups, blocks, b, b].

    0 where a variance is 0, beyond the size of a factor.
    """
    wide = s.double()
    deviations = wide.diagonal(dim1=-2, dim2=-1).sqrt()
    inside = (deviations > 0).double()
    scale = torch.where(deviations > 0, 1 / deviations, 0)
    correlations = wide * scale[..., :, None] * scale[..., None, :] + torch.diag_embed(1 - inside)
    # rounding of the sums in s must not make it indefinite
    correlations.diagonal(dim1=-2, dim2=-1).add_(torch.finfo(s.dtype).eps * s.shape[-1])
    lower = torch.linalg.cholesky(correlations)
    identity = torch.diag_embed(torch.ones_like(scale))
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False).mT
    return (inverse * inside[..., :, None] * inside[..., None, :]).to(s.dtype)


def _in_blocks(x: Tensor, factor: Tensor) -> Tensor:
    """[groups, rows, size] -> [groups, blocks, rows, b], filled up with zeros."""
    blocks, b = factor.shape[1:3]
    padded = nn.functional.pad(x, (0, blocks * b - x.shape[-1]))
    return padded.unflatten(-1, (blocks, b)).transpose(-3, -2)


def half(u: Tensor, a: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """B u = R (A o U) L for U = u [groups, rows, columns]; L = left, R = right."""
    x = a * u
    if left is None or right is None:
        return x
    return times(times(x, left).mT, right.mT).mT


def half_transposed(y: Tensor, a: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """B^T y = A o (R^T Y L^T)."""
    if left is None or right is None:
        return a * y
    return a * times(times(y, left.mT).mT, right).mT


def diagonal(a: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """The diagonal of Q = B^T B, in the shape of A."""
    if left is None or right is None:
        return a.square()
    rows = right.square().sum(-2).flatten(1)[:, : a.shape[1], None]
    columns = left.square().sum(-1).flatten(1)[:, None, : a.shape[2]]
    return a.square() * rows * columns
