"""flash-attn-4 on Hopper and Blackwell: one call for a tile, one for a wave of packed documents.

The library computes delta from out and dout, which are those over all keys. Where lse has a
gradient, or the queries come without out, it gets an out of zeros and dlse = -delta instead.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from ring_sp.kernels.bands import Band, coalesce, waves
from ring_sp.kernels.contract import Call, Rows, State, Step, accumulation_dtype, on_device
from ring_sp.kernels.delta import delta
from ring_sp.kernels.fold import fold, fold_gradient, settle, zero_sums
from ring_sp.regions import Tile

ROUNDS = True
NEEDS_OUT = False


def refusal(call: Call) -> str | None:
    """See `contract.Kernel`."""
    dims = call.head_dim, call.v_head_dim
    needs = (
        (call.device_type == "cuda", f"it runs on CUDA, not on {call.device_type}"),
        (
            call.dtype in {torch.bfloat16, torch.float16},
            f"it computes in bfloat16 or float16, not in {call.dtype}",
        ),
        (
            all(8 <= dim <= 256 and dim % 8 == 0 for dim in dims),
            f"head dims must be multiples of 8 up to 256, not {dims}",
        ),
        (
            # 4.0.0b36 on an H200, over all bands: lse was off by up to 5 for dims (128, 64); right
            # for (64, 64) and (128, 128), keys shared or not.
            dims[0] == dims[1],
            f"its lse is not sure unless head dims are equal, not {dims}",
        ),
        (
            # 4.0.0b36 on an H200, relative error of dq: 0.8 to 1.2 for 8, 16, 40, 48, 72, 80, 104
            # and 112; 0.003 for 24, 32, 56, 64, 88, 96, 120, 128, and 136 to 256.
            dims[0] > 128 or dims[0] % 32 == 0 or dims[0] % 32 > 16,
            f"its dq is wrong for a head dim of {dims[0]}, at most 16 above a multiple of 32",
        ),
        (call.scale > 0, f"its softmax wants a positive scale, not {call.scale}"),
        (not call.dropout, "it has no dropout"),
    )
    return next((reason for met, reason in needs if not met), None) or _unavailable(dims)


@cache
def _unavailable(dims: tuple[int, int]) -> str | None:
    """Why this machine cannot run it."""
    if not torch.cuda.is_available():
        return "this machine has no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if major not in {9, 10}:
        return f"it runs on GPUs of compute capability 9 and 10, not {major}.{minor}"
    if major == 10 and max(dims) > 128:
        return f"on compute capability 10 its backward takes no delta for head dims {dims}"
    try:
        _, backward_call = _library()
    except ImportError as error:
        return f"flash-attn-4 is not installed ({error}); pip install 'ring_sp[flash4]'"
    if "dlse" not in signature(backward_call).parameters:
        return "flash-attn-4 4.0.0b36 or newer is needed; this one takes no gradient of lse"
    return None


@cache
def _library() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Its forward and backward calls: the only place that knows the package."""
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    return _flash_attn_fwd, _flash_attn_bwd


@dataclass(frozen=True)
class _Side:
    """The rows or the columns of a part: those of a stretch that `index` names (None: all)."""

    at: slice
    index: Tensor | None

    def take(self, x: Tensor, packed: bool) -> Tensor:
        """[B, S, H, D] -> [B, s, H, D], or if `packed` [B * s, H, D]."""
        x = x if self.at == slice(0, x.shape[1]) else x[:, self.at]
        x = x if self.index is None else x.index_select(1, self.index)
        return x.flatten(0, 1) if packed else x

    def take_rows(self, x: Tensor, packed: bool) -> Tensor:
        """[B, H, S] -> [B, H, s], or if `packed` [H, B * s]."""
        x = x if self.at == slice(0, x.shape[2]) else x[:, :, self.at]
        x = x if self.index is None else x.index_select(2, self.index)
        return (x.transpose(0, 1).flatten(1) if packed else x).contiguous()

    def spread(self, x: Tensor, fill: float = 0.0, dim: int = 1) -> Tensor:
        """The whole stretch from what `take` gives, `fill` in between."""
        if self.index is None:
            return x
        shape = list(x.shape)
        shape[dim] = self.at.stop - self.at.start
        return x.new_full(shape, fill).index_copy_(dim, self.index, x)


@dataclass(frozen=True)
class _Part:
    """One call of the library: a tile, or tiles as packed sequences."""

    rows: _Side
    cols: _Side
    options: dict[str, Any]
    zeros: Tensor
    """A row for an out of zeros, in q's dtype; as wide as heads can be."""

    @property
    def packed(self) -> bool:
        return "cu_seqlens_q" in self.options


def forward(q: Tensor, k: Tensor, v: Tensor, step: Step, state: State | None) -> State:
    """See `contract.Kernel`."""
    parts = _parts(step, q)
    for number, part in enumerate(parts, 1):
        rows, cols, packed = part.rows, part.cols, part.packed
        out, lse, *_ = _library()[0](
            rows.take(q, packed),
            cols.take(k, packed),
            cols.take(v, packed),
            softmax_scale=step.scale,
            softcap=step.softcap,
            return_lse=True,
            **part.options,
        )
        if packed:
            out = out.unflatten(0, (q.shape[0], -1))
            lse = lse.unflatten(1, (q.shape[0], -1)).transpose(0, 1).contiguous()
        found = rows.spread(out), rows.spread(lse, -torch.inf, 2)
        done = step.final and number == len(parts)
        dtype = q.dtype if done else accumulation_dtype(q.dtype)
        state = fold(state, found, rows.at, q.shape[1], dtype)
    assert state is not None, "a step has tiles"
    return state


def backward(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    rows: Rows,
    step: Step,
    dq: Tensor | None,
    dkv: tuple[Tensor, Tensor],
) -> Tensor:
    """See `contract.Kernel`."""
    parts = _parts(step, q)
    sums = zero_sums(dkv, [part.cols.at for part in parts])
    for number, part in enumerate(parts, 1):
        into = (dkv[0][:, part.cols.at], dkv[1][:, part.cols.at])
        direct = sums is None and part.cols.index is None and _fits(into, q.dtype)
        dq_part, dk, dv = _gradients(part, (q, *kv), rows, step, into if direct else None)
        done = step.final and number == len(parts)
        dtype = q.dtype if done else accumulation_dtype(q.dtype)
        dq = fold_gradient(dq, part.rows.spread(dq_part), part.rows.at, q.shape[1], dtype)
        if sums is None:
            settle((part.cols.spread(dk), part.cols.spread(dv)), into)
        else:
            sums[0][:, part.cols.at] += part.cols.spread(dk)
            sums[1][:, part.cols.at] += part.cols.spread(dv)
    if sums is not None:
        settle(sums, dkv)
    assert dq is not None, "a step has tiles"
    return dq


def _gradients(
    part: _Part,
    qkv: tuple[Tensor, Tensor, Tensor],
    seen: Rows,
    step: Step,
    into: tuple[Tensor, Tensor] | None,
) -> list[Tensor]:
    """dq, dk and dv of one call in q's dtype, [B, s, heads, D]; dk and dv in `into`, if given."""
    q, k, v = qkv
    rows, cols, packed = part.rows, part.cols, part.packed
    grads, lse = rows.take(seen.dout, packed), rows.take_rows(seen.lse, packed)
    if seen.dlse is None and seen.out is not None:
        out, dlse = rows.take(seen.out, packed), None
    else:
        out = part.zeros[: grads.shape[-1]].expand_as(grads)
        dlse = -rows.take_rows(delta(seen), packed)
    dk, dv = (x.flatten(0, 1) if packed else x for x in into) if into else (None, None)
    found = _library()[1](
        rows.take(q, packed),
        cols.take(k, packed),
        cols.take(v, packed),
        out,
        grads,
        lse,
        softmax_scale=step.scale,
        softcap=step.softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        dlse=dlse,
        dk=dk,
        dv=dv,
        **part.options,
    )
    return [x.unflatten(0, (q.shape[0], -1)) if packed else x for x in found]


def _fits(buffers: tuple[Tensor, Tensor], dtype: torch.dtype) -> bool:
    """Whether the library can write into them."""
    return all(x.dtype == dtype and x.is_contiguous() and x.data_ptr() % 16 == 0 for x in buffers)


def _parts(step: Step, q: Tensor) -> list[_Part]:
    """The calls of a step; worked out once, tables on the device included."""
    key = "flash4", q.shape[0], q.dtype, q.device
    if key not in step.derived:
        zeros = q.new_zeros(256)
        step.derived[key] = [
            _part(band, tiles, q.shape[0], zeros) for band, tiles in waves(coalesce(step.tiles))
        ]
    found: list[_Part] = step.derived[key]
    return found


def _part(band: Band, tiles: list[Tile], batch: int, zeros: Tensor) -> _Part:
    spans = (
        [(tile.q_start, tile.q_stop) for tile in tiles],
        [(tile.k_start, tile.k_stop) for tile in tiles],
    )
    rows, cols = (_side(each, zeros.device) for each in spans)
    options: dict[str, Any] = {"window_size_left": band.left, "window_size_right": band.right}
    if len(tiles) > 1:
        for name, each in zip("qk", spans, strict=True):
            options[f"cu_seqlens_{name}"] = _cu_seqlens(each, batch, zeros.device)
            options[f"max_seqlen_{name}"] = max(stop - start for start, stop in each)
    return _Part(rows, cols, options, zeros)


def _side(spans: list[tuple[int, int]], device: torch.device) -> _Side:
    first, last = spans[0][0], spans[-1][1]
    if sum(stop - start for start, stop in spans) == last - first:
        return _Side(slice(first, last), None)
    # The library reads on past a sequence and multiplies by zero, which keeps NaN: leave gaps out.
    index = [torch.arange(start - first, stop - first, device="cpu") for start, stop in spans]
    return _Side(slice(first, last), on_device(torch.cat(index), device))


def _cu_seqlens(spans: list[tuple[int, int]], batch: int, device: torch.device) -> Tensor:
    lens = torch.tensor([0, *[stop - start for start, stop in spans] * batch], device="cpu")
    return on_device(lens.cumsum(0, dtype=torch.int32), device)
