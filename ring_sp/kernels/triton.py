"""Attention in Triton: on any GPU that it compiles for, in half precision or float32."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ring_sp.kernels.contract import Call, Rows, State, Step
from ring_sp.kernels.delta import delta

if TYPE_CHECKING:
    from ring_sp.kernels.triton_blocks import Shape

MAX_HEAD_DIM = 256

ROUNDS = False


def refusal(call: Call) -> str | None:
    """Serves GPUs, and the CPU where Triton interprets."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if call.device_type != "cuda" and not _interprets():
        return f"it runs on GPUs, not on {call.device_type}"
    if call.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it computes in float16, bfloat16 and float32, not {call.dtype}"
    if max(call.head_dim, call.v_head_dim) > MAX_HEAD_DIM:
        return f"it takes head dims to {MAX_HEAD_DIM}, not {call.head_dim} and {call.v_head_dim}"
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, step: Step, state: State | None) -> State:
    """See `contract.Kernel`."""
    from ring_sp.kernels.triton_forward import attend

    return attend(q, k, v, step, state, shapes(q, v)[0])


def backward(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    rows: Rows,
    step: Step,
    dq: Tensor | None,
    dkv: tuple[Tensor, Tensor],
) -> Tensor:
    """See `contract.Kernel`. Two runs give the same bits."""
    from ring_sp.kernels.triton_backward import key_gradients, query_gradients

    _, for_queries, for_keys = shapes(q, kv[1])
    lse_delta = rows.lse, delta(rows)
    key_gradients(rows.dout, q, kv, lse_delta, step, dkv, for_keys)
    return query_gradients(rows.dout, q, kv, lse_delta, step, dq, for_queries)


def shapes(q: Tensor, v: Tensor) -> tuple["Shape", "Shape", "Shape"]:
    """For the forward, for dq, and for dk and dv: by what is in a register file and in shared
    memory, never by length.
    """
    from ring_sp.kernels.triton_blocks import Shape

    dim = max(q.shape[3], v.shape[3])
    if q.dtype == torch.float32:
        small = Shape(32, 32, 4, 1)
        return (Shape(64, 32, 4, 2) if dim <= 128 else small), small, small
    hopper = q.is_cuda and torch.cuda.get_device_capability(q.device) >= (9, 0)
    if dim > 128:
        forward = Shape(128, 64, 8, 2, hopper) if hopper else Shape(64, 32, 4, 2)
        return (
            forward,
            Shape(64, 32, 4, 2 if hopper else 1, hopper),
            Shape(64, 32, 8, 2 if hopper else 1, hopper),
        )
    if not hopper:
        return Shape(128, 64, 8, 2), Shape(64, 64, 4, 2), Shape(64, 64, 4, 2)
    return (
        Shape(128, 128, 8, 3, True),
        Shape(128, 64, 8, 3, True),
        Shape(128, 64, 8, 3, True),
    )


def _interprets() -> bool:
    from triton import knobs

    return knobs.runtime.interpret
