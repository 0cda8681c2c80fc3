"""The PyTorch tiled backend (loss.backend=tiled): tiles of the similarity matrix that stay in cache.

Rows are sorted by class, so most tiles hold only negative pairs and a few only positive ones. The similarities of
the own rows with each other are symmetric: of that square, only the tiles on and above the diagonal are computed,
and each serves its mirror image below the diagonal too, which halves the work.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .autograd import RowSums
from .gathered import GatheredRows
from .precision import float32_products

# 512 x 512 fp32 is 1 MiB: the tile stays in the L2 cache between the matmul, the exp and the sums.
TILE_SIZE = 512
# Order of the sums in TorchTiledBackend.row_sums.
_SIM_POS, _EXP_POS, _EXP_NEG, _INV_POS, _SIM_INV_POS = range(5)


@dataclass(frozen=True)
class Tile:
    """One tile of the similarity matrix: `rows` of the own rows (0-based), `columns` of all gathered rows.

    `mirrored_rows` are the tile's columns as own rows (0-based), where the tile also serves its mirror image.
    `positive` is True where all its pairs are positive, False where all are negative, None where it holds both or
    the diagonal.
    """

    rows: slice
    columns: slice
    mirrored_rows: slice | None
    positive: bool | None
    diagonal: bool


def iterate_tiles(gathered: GatheredRows, tile_size: int) -> Iterator[Tile]:
    """The tiles that cover own rows x all rows, without mirror images. Waits for the device once."""
    own, symmetric = gathered.own, gathered.rows is None
    cuts = [
        slice(a, min(a + tile_size, stop)) for start, stop in gathered.blocks for a in range(start, stop, tile_size)
    ]
    if not cuts or own.stop == own.start:
        return
    # Blocks are sorted: the first and last row of a slice have its smallest and largest class.
    ends = torch.tensor([[cut.start, cut.stop - 1] for cut in cuts], device=gathered.class_ids.device)
    classes = gathered.class_ids[ends].tolist()
    for i, row_cut in enumerate(cuts):
        if not own.start <= row_cut.start < own.stop:
            continue
        for j, column_cut in enumerate(cuts):
            is_own = symmetric and own.start <= column_cut.start < own.stop
            if is_own and j < i:
                continue
            (low_i, high_i), (low_j, high_j) = classes[i], classes[j]
            positive: bool | None = None
            if i != j and (low_i > high_j or low_j > high_i):
                positive = False
            elif i != j and low_i == high_i == low_j == high_j:
                positive = True
            mirrored = _shift(column_cut, own.start) if is_own and i != j else None
            yield Tile(_shift(row_cut, own.start), column_cut, mirrored, positive, i == j)


def _shift(cut: slice, start: int) -> slice:
    return slice(cut.start - start, cut.stop - start)


class TileBuffers:
    """Computes tiles in buffers that are allocated once: fresh memory pages cost more than the arithmetic."""

    def __init__(self, gathered: GatheredRows, tile_size: int) -> None:
        self.gathered = gathered
        self.own_u = gathered.u[gathered.own] if gathered.rows is None else gathered.rows
        self.own_class_ids = gathered.class_ids[gathered.own]
        self._buffers = gathered.u.new_empty(3, tile_size * tile_size)

    def buffer(self, index: int, tile: Tile) -> Tensor:
        """Buffer 0, 1 or 2, in the shape of the tile."""
        rows, columns = tile.rows.stop - tile.rows.start, tile.columns.stop - tile.columns.start
        return self._buffers[index, : rows * columns].view(rows, columns)

    def similarity(self, tile: Tile) -> Tensor:
        """s of the tile, [R, C], in buffer 0."""
        out = self.buffer(0, tile)
        return torch.mm(self.own_u[tile.rows], self.gathered.u[tile.columns].T, out=out)

    def positives(self, tile: Tile) -> Tensor:
        """Mask [R, C] of the positive pairs, without the diagonal."""
        mask = self.own_class_ids[tile.rows, None] == self.gathered.class_ids[None, tile.columns]
        if tile.diagonal:
            mask.fill_diagonal_(False)
        return mask


class TorchTiledBackend:
    """The TiledBackend of PyTorch operations, on any device, with tiles of `tile_size` x `tile_size`.

    `exact`: fp32 products on CUDA are not TF32, whatever the process has.
    """

    def __init__(self, tile_size: int = TILE_SIZE, *, exact: bool = False) -> None:
        self.tile_size = tile_size
        self._precision = "fp32" if exact else None

    def row_sums(self, gathered: GatheredRows, temperature: Tensor | None) -> RowSums:
        with float32_products(self._precision):
            return self._row_sums(gathered, temperature)

    def row_gradients(self, gathered: GatheredRows, weights_M4: Tensor, temperature: Tensor | None) -> Tensor:
        with float32_products(self._precision):
            return self._row_gradients(gathered, weights_M4, temperature)

    def _row_sums(self, gathered: GatheredRows, temperature: Tensor | None) -> RowSums:
        buffers = TileBuffers(gathered, self.tile_size)
        n = buffers.own_u.shape[0]
        sums = torch.zeros(5, n, dtype=torch.float64, device=gathered.u.device)

        def add(which: int, values_RC: Tensor, tile: Tile) -> None:
            sums[which, tile.rows] += values_RC.sum(1)
            if tile.mirrored_rows is not None:
                sums[which, tile.mirrored_rows] += values_RC.sum(0)

        for tile in iterate_tiles(gathered, self.tile_size):
            sim_RC = buffers.similarity(tile)
            if tile.positive is False:
                add(_EXP_NEG, sim_RC.exp_(), tile)
                continue
            mask = None if tile.positive else buffers.positives(tile)
            part = buffers.buffer(1, tile)

            def of_positives(values: Tensor, mask: Tensor | None = mask, out: Tensor = part) -> Tensor:
                return values if mask is None else torch.mul(values, mask, out=out)

            add(_SIM_POS, of_positives(sim_RC), tile)
            if temperature is not None:
                inv_RC = torch.mul(sim_RC, -temperature, out=buffers.buffer(2, tile)).exp_()
                add(_INV_POS, of_positives(inv_RC), tile)
                add(_SIM_INV_POS, of_positives(inv_RC.mul_(sim_RC)), tile)
            exp_RC = sim_RC.exp_()
            add(_EXP_POS, of_positives(exp_RC), tile)
            if mask is not None:
                if tile.diagonal:
                    exp_RC.fill_diagonal_(0.0)
                add(_EXP_NEG, exp_RC.masked_fill_(mask, 0.0), tile)
        sim_pos, exp_pos, exp_neg, inv_pos, sim_inv_pos = sums
        if temperature is None:
            return RowSums(sim_pos, exp_pos, exp_neg, None, None)
        return RowSums(sim_pos, exp_pos, exp_neg, inv_pos, sim_inv_pos)

    def _row_gradients(self, gathered: GatheredRows, weights_M4: Tensor, temperature: Tensor | None) -> Tensor:
        buffers = TileBuffers(gathered, self.tile_size)
        grad_ND = torch.zeros_like(buffers.own_u)
        sim_weight, pos_weight, neg_weight, inv_weight = weights_M4.T.contiguous().unbind()
        start = gathered.own.start

        def both(weight_M: Tensor, tile: Tile, index: int) -> Tensor:
            """weight_i + weight_j over the tile, [R, C]: the weights in G_ij + G_ji. Constant columns have none."""
            of_rows = weight_M[start + tile.rows.start : start + tile.rows.stop, None]
            if gathered.rows is not None:
                return buffers.buffer(index, tile).copy_(of_rows)
            return torch.add(of_rows, weight_M[None, tile.columns], out=buffers.buffer(index, tile))

        for tile in iterate_tiles(gathered, self.tile_size):
            sim_RC = buffers.similarity(tile)
            if tile.positive is False:
                grad_RC = sim_RC.exp_().mul_(both(neg_weight, tile, 1))
            else:
                mask = None if tile.positive else buffers.positives(tile)
                inv_RC = None
                if temperature is not None:
                    inv_RC = torch.mul(sim_RC, -temperature, out=buffers.buffer(2, tile)).exp_()
                    inv_RC.mul_(both(inv_weight, tile, 1))
                exp_RC = sim_RC.exp_()
                of_negatives = None if mask is None else exp_RC * both(neg_weight, tile, 1)
                grad_RC = exp_RC.mul_(both(pos_weight, tile, 1)).add_(both(sim_weight, tile, 1))
                if inv_RC is not None and temperature is not None:
                    grad_RC.sub_(inv_RC.mul_(temperature))
                if mask is not None and of_negatives is not None:
                    grad_RC = torch.where(mask, grad_RC, of_negatives)
                if tile.diagonal:
                    grad_RC.fill_diagonal_(0.0)
            grad_ND[tile.rows].addmm_(grad_RC, gathered.u[tile.columns])
            if tile.mirrored_rows is not None:
                grad_ND[tile.mirrored_rows].addmm_(grad_RC.T, buffers.own_u[tile.rows])
        return grad_ND
