"""The torch backend: tiles of the similarity matrix that stay in cache, each computed once for both its sides.

Rows arrive sorted by class, so most tiles hold negatives only and a few hold positives only. In the
square of own rows against own columns only tiles on and above the diagonal are computed; each also
serves its mirror image, which halves the work.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .autograd import RowSums
from .gathered import Columns

# 512 x 512 fp32 is 1 MiB: the tile stays in the L2 cache between the matmul, the exp and the sums.
TILE = 512


@dataclass(frozen=True)
class Tile:
    """One tile: `rows` of the own rows (0-based), `columns` of all columns, and what it holds.

    `mirror` is the slice of own rows that the columns are when the tile also serves its mirror image.
    `positive` is True or False where all its pairs are, None where it holds both or the diagonal.
    """

    rows: slice
    columns: slice
    mirror: slice | None
    positive: bool | None
    diagonal: bool


def tiles(columns: Columns, edge: int) -> Iterator[Tile]:
    """The tiles that cover own rows x all columns, mirrored ones once; one read from the device."""
    own = columns.own
    cuts = [slice(a, min(a + edge, stop)) for start, stop in columns.blocks for a in range(start, stop, edge)]
    if not cuts or own.stop == own.start:
        return
    # Sorted blocks: the first and last row of a slice hold its smallest and largest class.
    ends = torch.tensor([[cut.start, cut.stop - 1] for cut in cuts], device=columns.ids.device)
    classes = columns.ids[ends].tolist()
    for i, row_cut in enumerate(cuts):
        if not own.start <= row_cut.start < own.stop:
            continue
        for j, column_cut in enumerate(cuts):
            is_own = own.start <= column_cut.start < own.stop
            if is_own and j < i:
                continue
            (low_i, high_i), (low_j, high_j) = classes[i], classes[j]
            positive: bool | None = None
            if i != j and (low_i > high_j or low_j > high_i):
                positive = False
            elif i != j and low_i == high_i == low_j == high_j:
                positive = True
            mirror = _shift(column_cut, own.start) if is_own and i != j else None
            yield Tile(_shift(row_cut, own.start), column_cut, mirror, positive, i == j)


def _shift(cut: slice, start: int) -> slice:
    return slice(cut.start - start, cut.stop - start)


class Workspace:
    """Tile-sized buffers that are allocated once and reused: fresh pages cost more than the arithmetic."""

    def __init__(self, columns: Columns, edge: int) -> None:
        self.columns = columns
        self.own_u = columns.u[columns.own]
        self.own_ids = columns.ids[columns.own]
        self._buffers = columns.u.new_empty(3, edge * edge)

    def buffer(self, index: int, tile: Tile) -> Tensor:
        rows, cols = tile.rows.stop - tile.rows.start, tile.columns.stop - tile.columns.start
        return self._buffers[index, : rows * cols].view(rows, cols)

    def similarity(self, tile: Tile) -> Tensor:
        """s [rows, columns] of the tile, in buffer 0."""
        out = self.buffer(0, tile)
        return torch.mm(self.own_u[tile.rows], self.columns.u[tile.columns].T, out=out)

    def positives(self, tile: Tile) -> Tensor:
        """Mask [rows, columns] of the positive pairs, without the diagonal."""
        mask = self.own_ids[tile.rows, None] == self.columns.ids[None, tile.columns]
        if tile.diagonal:
            mask.fill_diagonal_(False)
        return mask


class Tiles:
    """The tiled backend with tiles of `edge` x `edge`."""

    def __init__(self, edge: int = TILE) -> None:
        self.edge = edge

    def row_sums(self, columns: Columns, kappa: float | None) -> RowSums:
        work = Workspace(columns, self.edge)
        n = work.own_u.shape[0]
        # s_pos, exp_pos, exp_neg, inv, s_inv
        sums = torch.zeros(5, n, dtype=torch.float64, device=columns.u.device)

        def add(which: int, values: Tensor, tile: Tile) -> None:
            sums[which, tile.rows] += values.sum(1)
            if tile.mirror is not None:
                sums[which, tile.mirror] += values.sum(0)

        for tile in tiles(columns, self.edge):
            s = work.similarity(tile)
            if tile.positive is False:
                add(2, s.exp_(), tile)
                continue
            mask = None if tile.positive else work.positives(tile)
            part = work.buffer(1, tile)

            def of_positives(values: Tensor, mask: Tensor | None = mask, out: Tensor = part) -> Tensor:
                return values if mask is None else torch.mul(values, mask, out=out)

            add(0, of_positives(s), tile)
            if kappa is not None:
                inv = torch.mul(s, -kappa, out=work.buffer(2, tile)).exp_()
                add(3, of_positives(inv), tile)
                add(4, of_positives(inv.mul_(s)), tile)
            s.exp_()
            add(1, of_positives(s), tile)
            if mask is not None:
                if tile.diagonal:
                    s.fill_diagonal_(0.0)
                add(2, s.masked_fill_(mask, 0.0), tile)
        s_pos, exp_pos, exp_neg, inv_sum, s_inv = sums
        return RowSums(
            s_pos, exp_pos, exp_neg, inv_sum if kappa is not None else None, s_inv if kappa is not None else None
        )

    def row_gradients(self, columns: Columns, coefficients: Tensor, kappa: float | None) -> Tensor:
        work = Workspace(columns, self.edge)
        du = torch.zeros_like(work.own_u)
        c, p, n, f = coefficients.T.contiguous().unbind()
        start = columns.own.start

        def both(values: Tensor, tile: Tile, index: int) -> Tensor:
            """values_i + values_j over the tile."""
            of_rows = values[start + tile.rows.start : start + tile.rows.stop, None]
            return torch.add(of_rows, values[None, tile.columns], out=work.buffer(index, tile))

        for tile in tiles(columns, self.edge):
            s = work.similarity(tile)
            if tile.positive is False:
                g = s.exp_().mul_(both(n, tile, 1))
            else:
                mask = None if tile.positive else work.positives(tile)
                inv = None
                if kappa is not None:
                    inv = torch.mul(s, -kappa, out=work.buffer(2, tile)).exp_().mul_(both(f, tile, 1))
                s.exp_()
                negative = None if mask is None else s * both(n, tile, 1)
                g = s.mul_(both(p, tile, 1)).add_(both(c, tile, 1))
                if inv is not None and kappa is not None:
                    g.sub_(inv, alpha=kappa)
                if mask is not None and negative is not None:
                    g = torch.where(mask, g, negative)
                if tile.diagonal:
                    g.fill_diagonal_(0.0)
            du[tile.rows].addmm_(g, columns.u[tile.columns])
            if tile.mirror is not None:
                du[tile.mirror].addmm_(g.T, work.own_u[tile.rows])
        return du
