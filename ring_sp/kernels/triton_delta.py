"""`delta.delta` in one launch: dout and out are read once, and nothing else is made."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ring_sp.kernels.triton_blocks import load_block, padded, strides

ROWS = 32


def row_delta(dout: Tensor, out: Tensor, dlse: Tensor | None) -> Tensor:
    """dout and out [B, S, H, Dv], dlse [B, H, S] or None; [B, H, S] in float32."""
    batch, rows, heads, dim = out.shape
    delta = out.new_empty(batch, heads, rows, dtype=torch.float32)
    dlse = None if dlse is None else dlse.contiguous()
    delta_kernel[(triton.cdiv(rows, ROWS), heads, batch)](
        (dout, out, dlse, delta), (strides(dout), strides(out)), rows, dim, padded(dim), ROWS
    )
    return delta


@triton.jit
def delta_kernel(
    tensors, strides, num_rows, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr
):
    """A block of rows of one head."""
    dout, out, dlse, delta = tensors
    row, head, b = tl.program_id(0) * ROWS, tl.program_id(1), tl.program_id(2).to(tl.int64)
    bounds = (0, num_rows)
    dout += b * strides[0][0] + head.to(tl.int64) * strides[0][2]
    out += b * strides[1][0] + head.to(tl.int64) * strides[1][2]
    x = load_block(dout, row, bounds, strides[0][1], ROWS, DIM, BLOCK_DIM).to(tl.float32)
    y = load_block(out, row, bounds, strides[1][1], ROWS, DIM, BLOCK_DIM).to(tl.float32)
    total = tl.sum(x * y, 1)
    rows = row + tl.arange(0, ROWS)
    at = (b * tl.num_programs(1) + head) * num_rows + rows
    if dlse is not None:
        total -= tl.load(dlse + at, mask=rows < num_rows, other=0.0)
    tl.store(delta + at, total, mask=rows < num_rows)
