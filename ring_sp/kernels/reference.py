"""The oracle: attention in plain torch, on any device, in float32 or float64. Exact, not fast."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ring_sp.kernels.contract import Call, Rows, State, Step, accumulation_dtype, empty_state
from ring_sp.kernels.delta import delta
from ring_sp.kernels.merge import merge
from ring_sp.regions import Tile

BLOCK_ROWS = 128
"""Query rows whose scores exist at a time: bounds memory, and skips most of what a causal tile
hides.
"""

ROUNDS = False
NEEDS_OUT = False


def refusal(call: Call) -> str | None:
    """Serves every call in floating point."""
    return (
        None if call.dtype.is_floating_point else f"it computes in floating point, not {call.dtype}"
    )


def forward(q: Tensor, k: Tensor, v: Tensor, step: Step, state: State | None) -> State:
    """See `contract.Kernel`."""
    out, lse = state or empty_state(q, v.shape[3])
    out = out.to(accumulation_dtype(q.dtype))
    for tile in row_blocks(step.tiles):
        at_q, at_k = slice(tile.q_start, tile.q_stop), slice(tile.k_start, tile.k_stop)
        queries, keys, values = (
            grouped(q[:, at_q], k.shape[2]),
            grouped(k[:, at_k]),
            grouped(v[:, at_k]),
        )
        scores = scored(queries, keys, tile, step)
        part_lse = scores.logsumexp(-1)
        part = (scores - part_lse.unsqueeze(-1)).exp() * _kept(scores, tile, step)
        part = part @ values.unsqueeze(2)
        out[:, at_q], lse[:, :, at_q] = merge(
            out[:, at_q], lse[:, :, at_q], _ungroup(part), part_lse.flatten(1, 2)
        )
    return out.to(q.dtype) if step.final else out, lse


def backward(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    rows: Rows,
    step: Step,
    dq: Tensor | None,
    dkv: tuple[Tensor, Tensor],
) -> Tensor:
    """See `contract.Kernel`."""
    (k, v), (dk, dv), lse, subtracted = kv, dkv, rows.lse, delta(rows)
    dtype = accumulation_dtype(q.dtype)
    dq = torch.zeros_like(q, dtype=dtype) if dq is None else dq
    sums = torch.zeros_like(dk, dtype=dtype), torch.zeros_like(dv, dtype=dtype)
    for tile in row_blocks(step.tiles):
        at_q, at_k = slice(tile.q_start, tile.q_stop), slice(tile.k_start, tile.k_stop)
        queries, keys, values = (
            grouped(q[:, at_q], k.shape[2]),
            grouped(k[:, at_k]),
            grouped(v[:, at_k]),
        )
        grads = grouped(rows.dout[:, at_q], k.shape[2])
        scores = scored(queries, keys, tile, step)
        weights = (scores - _rows(lse, at_q, grads)).exp()
        kept = _kept(scores, tile, step)
        dweights = grads @ values.unsqueeze(2).mT * kept
        dscores = weights * (dweights - _rows(subtracted, at_q, grads))
        if step.softcap is not None:
            # Masked scores are -inf; their weight is zero, which 0 * inf must not undo.
            dscores = dscores * (1 - (scores.clamp_min(-step.softcap) / step.softcap).square())
        dq[:, at_q] += _ungroup(dscores @ keys.unsqueeze(2)) * step.scale
        sums[0][:, at_k] += (dscores.mT @ queries).sum(2).transpose(1, 2) * step.scale
        sums[1][:, at_k] += ((weights * kept).mT @ grads).sum(2).transpose(1, 2)
    dk.copy_(sums[0])
    dv.copy_(sums[1])
    return dq.to(q.dtype) if step.final else dq


def scored(queries: Tensor, keys: Tensor, tile: Tile, step: Step) -> Tensor:
    """[B, Hkv, G, rows, cols], -inf where the tile's band hides a pair."""
    scores = queries @ keys.unsqueeze(2).mT * step.scale
    if step.softcap is not None:
        scores = step.softcap * torch.tanh(scores / step.softcap)
    if tile.full:
        return scores
    row, col = (torch.arange(length, device=scores.device) for length in scores.shape[-2:])
    offset = row[:, None] - col
    return scores.masked_fill((offset < tile.lo) | (offset > tile.hi), -torch.inf)


def _kept(scores: Tensor, tile: Tile, step: Step) -> Tensor | float:
    """What dropout makes of each weight, like `scores` [B, Hkv, G, rows, cols]."""
    if step.dropout is None:
        return 1.0
    batch, kv_heads, group, *_ = scores.shape
    at_q, at_k = slice(tile.q_start, tile.q_stop), slice(tile.k_start, tile.k_stop)
    kept = step.dropout.kept(batch, kv_heads * group, at_q, at_k, scores.dtype)
    return kept.unflatten(1, (kv_heads, group))


def row_blocks(tiles: tuple[Tile, ...]) -> Iterator[Tile]:
    """The tiles cut into blocks of rows, each with the columns that its rows see."""
    for tile in tiles:
        for start in range(0, tile.q_stop - tile.q_start, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, tile.q_stop - tile.q_start)
            first = max(start - tile.hi, 0)
            last = min(stop - tile.lo, tile.k_stop - tile.k_start)
            yield Tile(
                tile.q_start + start,
                tile.q_start + stop,
                tile.k_start + first,
                tile.k_start + last,
                max(tile.lo - start + first, 1 + first - last),
                min(tile.hi - start + first, stop - start - 1),
            )


def grouped(x: Tensor, kv_heads: int | None = None) -> Tensor:
    """[B, S, H, D] -> [B, Hkv, G, S, D], or without `kv_heads` -> [B, H, S, D]; in the
    accumulation dtype.
    """
    x = x.to(accumulation_dtype(x.dtype)).transpose(1, 2)
    return x if kv_heads is None else x.unflatten(1, (kv_heads, -1))


def _ungroup(x: Tensor) -> Tensor:
    """[B, Hkv, G, S, D] -> [B, S, H, D]."""
    return x.flatten(1, 2).transpose(1, 2)


def _rows(x: Tensor, at: slice, like: Tensor) -> Tensor:
    """[B, H, S] -> [B, Hkv, G, rows, 1], grouped as `like`."""
    return x[:, :, at].unflatten(1, like.shape[1:3]).unsqueeze(-1)
