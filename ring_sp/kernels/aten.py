"""Attention from torch's own operators, which know full tiles and causal squares."""

from collections.abc import Callable

import torch
from torch import Tensor

from ring_sp.kernels.bands import coalesce, without_stairs
from ring_sp.kernels.contract import Call, Rows, State, Step, accumulation_dtype
from ring_sp.kernels.fold import fold, fold_gradient, settle, zero_sums
from ring_sp.regions import Tile

MAX_REGIONS = 64
"""Regions of a mask up to which a call or more for each is worth it."""


Attend = Callable[[Tensor, Tensor, Tensor, bool, float], State]
"""(q, k, v, causal, scale), all rows of a tile in [B, S, H, D] -> out, lse [B, H, S]."""
Differentiate = Callable[
    [Tensor, tuple[Tensor, Tensor, Tensor], State, bool, float], tuple[Tensor, Tensor, Tensor]
]
"""(dout, (q, k, v), (out, lse), causal, scale) -> dq, dk, dv."""


def common_refusal(call: Call) -> str | None:
    """What no operator of torch serves."""
    dims = call.head_dim, call.v_head_dim
    needs = (
        (call.device_type == "cuda", f"it runs on CUDA, not on {call.device_type}"),
        (
            call.dtype in {torch.bfloat16, torch.float16},
            f"it computes in bfloat16 or float16, not in {call.dtype}",
        ),
        (all(dim % 8 == 0 for dim in dims), f"head dims must be multiples of 8, not {dims}"),
        (call.scale > 0, f"it wants a positive scale, not {call.scale}"),
        (not call.softcap, "it has no softcap"),
        (not call.dropout, "its dropout knows no positions"),
        (not call.windowed, "it has no sliding window, nor any limit on the left of a diagonal"),
        (
            call.num_regions <= MAX_REGIONS,
            f"it would take a call for each of {call.num_regions} documents or other regions",
        ),
        (not call.lse_gradient, "its backward takes no gradient of lse, as sinks need"),
    )
    return next((reason for met, reason in needs if not met), None)


def unavailable(call: Call, capability: int, max_dim: int, available: bool) -> str | None:
    """Why this machine cannot serve a call with a backend that wants a compute capability."""
    if not available:
        return "this machine or this build of torch cannot run it"
    major, minor = torch.cuda.get_device_capability()
    dims = call.head_dim, call.v_head_dim
    if max(dims) > max_dim:
        return f"head dims must be at most {max_dim}, not {dims}"
    if major < capability:
        return f"it runs on GPUs from compute capability {capability} on, not {major}.{minor}"
    return None


def forward(
    attend: Attend, qkv: tuple[Tensor, Tensor, Tensor], step: Step, state: State | None
) -> State:
    """See `contract.Kernel`."""
    q, k, v = qkv
    tiles = _tiles(step)
    for number, tile in enumerate(tiles, 1):
        at_q, at_k = slice(tile.q_start, tile.q_stop), slice(tile.k_start, tile.k_stop)
        part = attend(q[:, at_q], k[:, at_k], v[:, at_k], not tile.full, step.scale)
        done = step.final and number == len(tiles)
        dtype = q.dtype if done else accumulation_dtype(q.dtype)
        state = fold(state, part, at_q, q.shape[1], dtype)
    assert state is not None, "a step has tiles"
    return state


def backward(
    differentiate: Differentiate,
    qkv: tuple[Tensor, Tensor, Tensor],
    rows: Rows,
    step: Step,
    dq: Tensor | None,
    dkv: tuple[Tensor, Tensor],
) -> Tensor:
    """See `contract.Kernel`."""
    q, k, v = qkv
    assert rows.out is not None, "its modules say NEEDS_OUT"
    tiles = _tiles(step)
    sums = zero_sums(dkv, [slice(tile.k_start, tile.k_stop) for tile in tiles])
    for number, tile in enumerate(tiles, 1):
        at_q, at_k = slice(tile.q_start, tile.q_stop), slice(tile.k_start, tile.k_stop)
        dq_part, dk, dv = differentiate(
            rows.dout[:, at_q],
            (q[:, at_q], k[:, at_k], v[:, at_k]),
            (rows.out[:, at_q], rows.lse[:, :, at_q].contiguous()),
            not tile.full,
            step.scale,
        )
        done = step.final and number == len(tiles)
        dtype = q.dtype if done else accumulation_dtype(q.dtype)
        dq = fold_gradient(dq, dq_part, at_q, q.shape[1], dtype)
        if sums is None:
            settle((dk, dv), (dkv[0][:, at_k], dkv[1][:, at_k]))
        else:
            sums[0][:, at_k] += dk
            sums[1][:, at_k] += dv
    if sums is not None:
        settle(sums, dkv)
    assert dq is not None, "a step has tiles"
    return dq


def _tiles(step: Step) -> list[Tile]:
    if "aten" not in step.derived:
        step.derived["aten"] = [
            piece for tile in coalesce(step.tiles) for piece in without_stairs(tile)
        ]
    found: list[Tile] = step.derived["aten"]
    return found
