"""What a backward subtracts in each row, worked out once for a pass."""

import torch
from torch import Tensor

from ring_sp.kernels.contract import Rows, accumulation_dtype
from ring_sp.kernels.triton_found import missing


def delta(rows: Rows) -> Tensor:
    """The sum of dout * out along Dv, less the gradient of lse: [B, H, Sq] in the accumulation
    dtype (arXiv:2307.08691, section 3.1).
    """
    if "delta" not in rows.derived:
        assert rows.out is not None, "rows without out have their delta"
        rows.derived["delta"] = _delta(rows.dout, rows.out, rows.dlse)
    return rows.derived["delta"]


def _delta(dout: Tensor, out: Tensor, dlse: Tensor | None) -> Tensor:
    dtype = accumulation_dtype(out.dtype)
    if out.is_cuda and dtype == torch.float32 and not missing():
        from ring_sp.kernels import triton_delta

        return triton_delta.row_delta(dout, out, dlse)
    found = (dout.to(dtype) * out.to(dtype)).sum(-1).transpose(1, 2)
    return found if dlse is None else found - dlse
