"""cuDNN's fused attention, through torch's own operators: no package besides torch."""

import torch
from torch import Tensor

from ring_sp.kernels import aten
from ring_sp.kernels.contract import Call, Rows, State, Step

ROUNDS = True
NEEDS_OUT = True


def refusal(call: Call) -> str | None:
    """See `contract.Kernel`."""
    if call.deterministic:
        # torch does not ask cuDNN for its deterministic backward, and never takes it in that mode.
        return "its backward sums in any order, and torch's deterministic mode is on"
    available = torch.cuda.is_available() and torch.backends.cudnn.is_available()
    return aten.common_refusal(call) or aten.unavailable(call, 9, 128, available)


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
    batch, rows, heads, _ = q.shape
    if (rows, k.shape[1]) == (1, 1):
        q = _two(q)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *_heads_first(q, k, v), None, True, 0.0, causal, scale=scale
    )
    return out.transpose(1, 2)[:, :rows], lse.reshape(batch, heads, -1)[:, :, :rows]


def _differentiate(
    dout: Tensor, qkv: tuple[Tensor, Tensor, Tensor], seen: State, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    (q, k, v), (out, lse) = qkv, seen
    rows = q.shape[1]
    if (rows, k.shape[1]) == (1, 1):
        q, dout, out, lse = _two(q), _two(dout), _two(out), _two(lse, 2)
    unused = torch.empty(0, dtype=torch.int64, device=q.device)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *_heads_first(dout, q, k, v, out),
        lse.unsqueeze(-1),
        unused,
        unused,
        None,
        None,
        None,
        q.shape[1],
        k.shape[1],
        0.0,
        causal,
        scale=scale,
    )
    return dq.transpose(1, 2)[:, :rows], dk.transpose(1, 2), dv.transpose(1, 2)


def _two(x: Tensor, dim: int = 1) -> Tensor:
    """A row of zeros beside the only one, with no gradient to give: cuDNN refuses one query that
    meets one key.
    """
    return torch.cat([x, torch.zeros_like(x)], dim)


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]
