"""Attention in Triton: on any GPU that it compiles for, in half precision or float32."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ring_sp.kernels.contract import Call, Rows, State, Step
from ring_sp.kernels.delta import delta
from ring_sp.kernels.triton_found import missing

if TYPE_CHECKING:
    from ring_sp.kernels.triton_blocks import Shape

MAX_HEAD_DIM = 256

ROUNDS = False
NEEDS_OUT = False


def refusal(call: Call) -> str | None:
    """Serves GPUs, and the CPU where Triton interprets."""
    if missing() is not None:
        return missing()
    if call.device_type != "cuda" and not _interprets():
        return f"it runs on GPUs, not on {call.device_type}"
    if call.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it computes in float16, bfloat16 and float32, not {call.dtype}"
    if call.dtype == torch.bfloat16 and _interprets():
        return "Triton's interpreter takes the bits of bfloat16 for an integer in a product"
    if max(call.head_dim, call.v_head_dim) > MAX_HEAD_DIM:
        return f"it takes head dims to {MAX_HEAD_DIM}, not {call.head_dim} and {call.v_head_dim}"
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, step: Step, state: State | None) -> State:
    """See `contract.Kernel`."""
    from ring_sp.kernels import triton_forward, triton_hopper

    if _generation(q) == 9 and triton_hopper.serves(q, k, v, step):
        return triton_hopper.attend(q, k, v, step, state)
    return triton_forward.attend(q, k, v, step, state, shapes(q, v)[0])


def backward(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    rows: Rows,
    step: Step,
    dq: Tensor | None,
    dkv: tuple[Tensor, Tensor],
) -> Tensor:
    """See `contract.Kernel`. Two runs give the same bits.

    Measured at 16k tokens, causal, bf16, on one H200, in TFLOP/s of the five products that a
    gradient needs, though seven are made: dim 128, 32:8 heads, 477 on Hopper's own path and 420 on
    the other; dim 64, 32:32 heads, 356 and 342.
    """
    from ring_sp.kernels import triton_backward, triton_hopper_backward

    lse_delta = rows.lse, delta(rows)
    if _generation(q) == 9 and triton_hopper_backward.serves(rows.dout, q, kv, lse_delta, step):
        triton_hopper_backward.key_gradients(rows.dout, q, kv, lse_delta, step, dkv)
        return triton_hopper_backward.query_gradients(rows.dout, q, kv, lse_delta, step, dq)
    _, for_queries, for_keys = shapes(q, kv[1])
    triton_backward.key_gradients(rows.dout, q, kv, lse_delta, step, dkv, for_keys)
    return triton_backward.query_gradients(rows.dout, q, kv, lse_delta, step, dq, for_queries)


def shapes(q: Tensor, v: Tensor) -> tuple["Shape", "Shape", "Shape"]:
    """For the forward, for dq, and for dk and dv: by head dims and what the GPU has, never by
    length.

    Measured at 16k tokens, causal, bf16, on one H100: dim 64, 32:32 heads, 411, 599 and 542 TFLOP/s
    of matrix products; dim 128, 32:8 heads, 500, 693 and 599; dim 256, 16:8 heads, 532, 495 and
    339.
    """
    from ring_sp.kernels.triton_blocks import Shape

    dim = max(q.shape[3], v.shape[3])
    if q.dtype == torch.float32:
        # No matrix units: more rows, or fewer warps, spill registers (forward, dim 128, sm_90).
        return (Shape(32, 32, 8, 1),) * 3
    # 227 KiB of shared memory and a copy engine; later desktop GPUs have less.
    if _generation(q) in (9, 10):
        if dim <= 64:
            return Shape(128, 64, 4, 3, True), Shape(64, 64, 4, 3, True), Shape(64, 64, 4, 3, True)
        if dim <= 128:
            deep = Shape(128, 64, 8, 3, True)
            return Shape(128, 128, 8, 3, True), deep, deep
        return Shape(128, 64, 8, 2, True), Shape(128, 32, 8, 2, True), Shape(64, 64, 8, 2, True)
    if dim <= 128:
        return Shape(128, 64, 8, 2), Shape(64, 64, 4, 2), Shape(64, 64, 4, 2)
    return Shape(64, 32, 4, 2), Shape(64, 32, 4, 1), Shape(64, 32, 8, 1)


def _generation(x: Tensor) -> int:
    """Of NVIDIA's GPUs: 9 is Hopper; 0 for all else."""
    if not x.is_cuda or torch.version.cuda is None:
        return 0
    return torch.cuda.get_device_capability(x.device)[0]


def _interprets() -> bool:
    from triton import knobs

    return knobs.runtime.interpret
