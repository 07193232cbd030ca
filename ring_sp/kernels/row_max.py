"""The largest product of each query with the keys that it sees."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ring_sp.kernels import triton
from ring_sp.kernels.contract import Call, Step
from ring_sp.kernels.reference import grouped, row_blocks, scored
from ring_sp.regions import Tile

BLOCK_COLS = 1024
"""Keys whose scores exist at a time, beside the reference's rows: bounds memory."""


def fold(q: Tensor, k: Tensor, step: Step, top: Tensor) -> None:
    """Raise `top` [B, H, Sq], in place, to each row's largest score with the keys of a step.

    q is [B, Sq, H, D] and k [B, Sk, Hkv, D], dense in their last dimension; `top` has the
    accumulation dtype, and -inf where a row has seen nothing. Scores are q.k times step.scale: a
    softcap keeps their order, and is for the end. By Triton where its attention kernel would run,
    else in plain torch; two runs give the same bits.
    """
    assert step.softcap is None
    if triton.refusal(Call(q.device.type, q.dtype, q.shape[3], q.shape[3])) is None:
        from ring_sp.kernels import triton_row_max

        triton_row_max.fold(q, k, step, top, triton.shapes(q, k)[0])
        return
    for tile in _pieces(step.tiles):
        at_q, at_k = slice(tile.q_start, tile.q_stop), slice(tile.k_start, tile.k_stop)
        scores = scored(grouped(q[:, at_q], k.shape[2]), grouped(k[:, at_k]), tile, step)
        top[:, :, at_q] = torch.maximum(top[:, :, at_q], scores.amax(-1).flatten(1, 2))


def _pieces(tiles: tuple[Tile, ...]) -> Iterator[Tile]:
    """The tiles cut into blocks of rows and of columns; some rows of a block may be empty."""
    for tile in row_blocks(tiles):
        rows, cols = tile.q_stop - tile.q_start, tile.k_stop - tile.k_start
        for start in range(0, cols, BLOCK_COLS):
            width = min(BLOCK_COLS, cols - start)
            first = tile.k_start + start
            lo, hi = max(tile.lo + start, 1 - width), min(tile.hi + start, rows - 1)
            yield Tile(tile.q_start, tile.q_stop, first, first + width, lo, hi)
