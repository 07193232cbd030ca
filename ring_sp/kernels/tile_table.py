"""The tiles of a step as a table on the device, to be walked one block of rows at a time."""

from typing import NamedTuple

import torch
from torch import Tensor

from ring_sp.kernels.contract import Step, on_device

ALIGN = 4
"""Slots: a copy of lse or delta by the copy engine starts at a multiple of 16 bytes."""


class TileTable(NamedTuple):
    """For each block of rows the stretches of columns that some of its rows see, one for each tile.

    `entries` int32 [N, 8] are (row start, row stop, lo, hi, start, full start, full stop, stop):
    row r sees column c where row start <= r < row stop, start <= c < stop and lo <= r - c <= hi. A
    kernel reads columns in blocks: from `start`, brought down to a multiple of ALIGN, to full
    start; from there to full stop, where all rows of the block see all columns; and from full stop
    on. The first two are whole blocks, and no stretch is empty. Block b of rows has entries
    offsets[b] .. offsets[b + 1] - 1, with `offsets` int32 [blocks + 1]; `order` int32 [blocks] has
    those with the most work first, and only the first `num_active` have any.
    """

    entries: Tensor
    offsets: Tensor
    order: Tensor
    num_active: int


def tile_table(
    step: Step, device: torch.device, num_rows: int, blocks: tuple[int, int], keys: bool = False
) -> TileTable:
    """The table for blocks of (rows, columns) slots, made once for a step; with `keys`, rows are
    the keys and columns the queries.
    """
    name = "tile_table", device, num_rows, blocks, keys
    if name not in step.derived:
        with torch.device("cpu"):
            *parts, num_active = _build(step, num_rows, blocks, keys)
        sizes = [part.numel() for part in parts]
        packed = torch.cat([part.flatten() for part in parts]).to(torch.int32)
        entries, offsets, order = on_device(packed, device).split(sizes)
        step.derived[name] = TileTable(entries, offsets, order, num_active)
    return step.derived[name]


def _build(
    step: Step, num_rows: int, blocks: tuple[int, int], keys: bool
) -> tuple[Tensor, Tensor, Tensor, int]:
    rows, cols = blocks
    q_start, q_stop, k_start, k_stop, lo, hi = torch.tensor(step.tiles, dtype=torch.int64).unbind(1)
    if keys:
        q_start, q_stop, k_start, k_stop, lo, hi = k_start, k_stop, q_start, q_stop, -hi, -lo
    first = q_start // rows
    count = (q_stop - 1) // rows - first + 1
    tile = torch.repeat_interleave(count)
    block = torch.arange(len(tile)) - (count.cumsum(0) - count - first)[tile]
    block, by_block = block.sort(stable=True)
    tile = tile[by_block]
    q_start, q_stop, k_start, k_stop, lo, hi = (
        x[tile]
        for x in (q_start, q_stop, k_start, k_stop, lo + q_start - k_start, hi + q_start - k_start)
    )
    block_stop = (block * rows + rows).clamp_max(num_rows)
    top, bottom = q_start.maximum(block * rows), q_stop.minimum(block_stop) - 1
    start, stop = k_start.maximum(top - hi), k_stop.minimum(bottom - lo + 1)
    first = start // ALIGN * ALIGN
    full_start = first + (start.maximum(bottom - hi) - first + cols - 1) // cols * cols
    num_full = (stop.minimum(top - lo + 1) - full_start) // cols
    whole = (q_start <= block * rows) & (q_stop >= block_stop) & (num_full > 0)
    full_start = full_start.where(whole, first)
    full_stop = full_start + (num_full * cols).where(whole, 0)
    entries = torch.stack([q_start, q_stop, lo, hi, start, full_start, full_stop, stop], 1)
    # Of a tile's keys, some may be seen by none of its queries.
    some = start < stop
    entries, block, lengths = entries[some], block[some], (stop - start)[some]

    num_blocks = -(-num_rows // rows)
    per_block = torch.bincount(block, minlength=num_blocks)
    offsets = torch.cat([per_block.new_zeros(1), per_block.cumsum(0)])
    work = torch.zeros(num_blocks, dtype=torch.int64).index_add_(0, block, lengths + cols)
    order = work.argsort(descending=True, stable=True)
    return entries, offsets, order, int((work > 0).sum())
