"""FlashAttention-2 as torch brings it: no package besides torch."""

import torch
from torch import Tensor

from ring_sp.kernels import aten
from ring_sp.kernels.contract import Call, Rows, State, Step

ROUNDS = True
NEEDS_OUT = True


def refusal(call: Call) -> str | None:
    """See `contract.Kernel`."""
    if call.head_dim != call.v_head_dim:
        return f"it wants one head dim, not {call.head_dim} and {call.v_head_dim}"
    available = torch.cuda.is_available() and torch.backends.cuda.is_flash_attention_available()
    return aten.common_refusal(call) or aten.unavailable(call, 8, 256, available)


def forward(q: Tensor, k: Tensor, v: Tensor, step: Step, state: State | None) -> State:
    """See `contract.Kernel`."""
    return aten.forward(_attend, (q, k, v), step, state)


def backward(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    rows: Rows,
    step: Step,
    dq: Tensor | None,
    dkv: tuple[Tensor, Tensor],
) -> Tensor:
    """See `contract.Kernel`."""
    return aten.backward(_differentiate, (q, *kv), rows, step, dq, dkv)


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> State:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *(q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False),
        scale=scale,
    )
    return out, lse


def _differentiate(
    dout: Tensor, qkv: tuple[Tensor, Tensor, Tensor], seen: State, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv
    unused = torch.empty(0, dtype=torch.int64, device=q.device)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        dout,
        q,
        k,
        v,
        *seen,
        None,
        None,
        q.shape[1],
        k.shape[1],
        0.0,
        causal,
        unused,
        unused,
        scale=scale,
    )
    return dq, dk, dv
