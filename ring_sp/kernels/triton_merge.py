"""`merge` in one launch, for kernels that cannot carry a state themselves."""

import torch
import triton
import triton.language as tl

from ring_sp.kernels.contract import State
from ring_sp.kernels.triton_blocks import LOG2E, load_block, padded, store_block, strides

ROWS = 64


def fold(state: State | None, part: State, rows: slice, num_rows: int, dtype: torch.dtype) -> State:
    """The state with attention over more keys folded in, its out in `dtype`.

    `part` is (out [B, R, H, Dv] in any dtype, lse [B, H, R] float32) of the R queries `rows` of
    `num_rows`; None starts a state, in which the other queries have seen nothing. The state's
    memory is reused where its dtype is `dtype`, and its lse always.
    """
    part_out, part_lse = part
    batch, stretch, heads, dim = part_out.shape
    start, stop, _ = rows.indices(num_rows)
    assert stop - start == stretch
    old, lse = state or (None, part_lse.new_empty(batch, heads, num_rows))
    if old is not None and old.dtype == dtype:
        out, first, length = old, start, stretch
    else:
        out = part_out.new_empty(batch, num_rows, heads, dim, dtype=dtype)
        first, length = 0, num_rows
    if not batch * length * heads:
        return out, lse
    fold_kernel[(triton.cdiv(length, ROWS) * batch * heads,)](
        (part_out, part_lse, out, lse, old),
        (
            strides(part_out),
            part_lse.stride(),
            strides(out),
            lse.stride(),
            strides(out if old is None else old),
        ),
        (batch, heads),
        (first, first + length, start, stop),
        dim,
        padded(dim),
        ROWS,
    )
    return out, lse


@triton.jit
def fold_kernel(
    tensors,
    strides,
    sizes,
    bounds,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A block of rows of one head."""
    part, part_lse, out, lse, old = tensors
    batch, heads = sizes
    first, last, start, stop = bounds
    at = tl.program_id(0)
    head, b = at % heads, (at // heads % batch).to(tl.int64)
    row = first + at // (batch * heads) * ROWS
    rows = row + tl.arange(0, ROWS)
    in_part, exist = (rows >= start) & (rows < stop), rows < last
    part += b * strides[0][0] + head.to(tl.int64) * strides[0][2]
    part_lse += b * strides[1][0] + head.to(tl.int64) * strides[1][1]
    of_out = b * strides[2][0] + head.to(tl.int64) * strides[2][2]
    at_lse = lse + b * strides[3][0] + head.to(tl.int64) * strides[3][1] + rows * strides[3][2]
    from_part = (rows - start).to(tl.int64)
    mine = tl.load(part_lse + from_part * strides[1][2], mask=in_part, other=float("-inf")) * LOG2E
    dims = tl.arange(0, BLOCK_DIM)
    x = tl.load(
        part + from_part[:, None] * strides[0][1] + dims[None, :],
        mask=in_part[:, None] & (dims < DIM)[None, :],
        other=0.0,
    ).to(tl.float32)
    if old is not None:
        before = tl.load(at_lse, mask=exist, other=float("-inf")) * LOG2E
        top = tl.maximum(before, mine)
        floor = tl.where(top == float("-inf"), 0.0, top)
        keep, add = tl.exp2(before - floor), tl.exp2(mine - floor)
        total = tl.where(top == float("-inf"), 1.0, keep + add)
        old += b * strides[4][0] + head.to(tl.int64) * strides[4][2]
        y = load_block(old, row, (0, last), strides[4][1], ROWS, DIM, BLOCK_DIM)
        x = (y * keep[:, None] + x * add[:, None]) / total[:, None]
        mine = top + tl.log2(total)
    # Warps read each other's rows of lse, which this overwrites.
    tl.debug_barrier()
    store_block(out + of_out, x, row, last, strides[2][1], ROWS, DIM, BLOCK_DIM)
    tl.store(at_lse, mine / LOG2E, mask=exist)
