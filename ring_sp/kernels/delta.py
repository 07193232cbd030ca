"""What the backward of every kernel subtracts in each row, worked out once for a pass."""

import torch
from torch import Tensor

from ring_sp.kernels.contract import accumulation_dtype


def row_delta(dout: Tensor, out: Tensor, dlse: Tensor | None) -> Tensor:
    """The sum of dout * out along Dv, less the gradient of lse (arXiv:2307.08691, section 2.3.2).

    dout and out [B, S, H, Dv], dlse [B, H, S] or None for zero; the result [B, H, S] is in the
    accumulation dtype.
    """
    dtype = accumulation_dtype(out.dtype)
    if out.is_cuda and dtype == torch.float32:
        from ring_sp.kernels import triton_delta

        return triton_delta.row_delta(dout, out, dlse)
    delta = (dout.to(dtype) * out.to(dtype)).sum(-1).transpose(1, 2)
    return delta if dlse is None else delta - dlse
