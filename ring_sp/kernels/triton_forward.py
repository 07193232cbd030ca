"""Attention of queries over the keys of one step, folded into a running result, in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ring_sp.kernels.contract import State, Step
from ring_sp.kernels.tile_table import tile_table
from ring_sp.kernels.triton_blocks import (
    LOG2E,
    Shape,
    descriptor,
    drop_of,
    dropped,
    head_of,
    in_dense,
    load_block,
    load_dense,
    load_entry,
    masked_start,
    num_masked,
    padded,
    raw_scores,
    score_factors,
    store_block,
    strides,
    visible,
)


def attend(q: Tensor, k: Tensor, v: Tensor, step: Step, state: State | None, shape: Shape) -> State:
    """See `contract.Kernel.forward`."""
    batch, num_rows, heads, dim = q.shape
    v_dim = v.shape[3]
    table = tile_table(step, q.device, num_rows, (shape.rows, shape.cols))
    scale = step.scale
    if scale < 0:
        q, scale = -q, -scale
    dtype = q.dtype if step.final else torch.float32
    old, lse = state or (None, q.new_empty(batch, heads, num_rows, dtype=torch.float32))
    if old is not None and old.dtype == dtype:
        out, num_blocks = old, table.num_active
    else:
        out, num_blocks = q.new_empty(batch, num_rows, heads, v_dim, dtype=dtype), len(table.order)
    inner, factor = score_factors(scale, step.softcap)
    forward_kernel[(num_blocks * batch * heads,)](
        (q, k, v, out, lse, old),
        descriptor(k, shape.cols, shape),
        descriptor(v, shape.cols, shape),
        table[:3],
        (strides(q), strides(k), strides(v)),
        (batch, heads, num_rows),
        (inner, factor),
        drop_of(step),
        heads // k.shape[2],
        step.softcap is not None,
        dim,
        v_dim,
        padded(dim),
        padded(v_dim),
        shape.rows,
        shape.cols,
        num_warps=shape.warps,
        num_stages=shape.stages,
    )
    return out, lse


@triton.jit
def forward_kernel(
    tensors,
    k_tiles,
    v_tiles,
    table,
    strides,
    sizes,
    factors,
    drop,
    GROUP,
    SOFTCAP: tl.constexpr,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_V_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One block of rows of one head: heavy blocks of all heads come first."""
    q, k, v, out, lse, old = tensors
    batch, heads, num_rows = sizes
    at = tl.program_id(0)
    block = tl.load(table[2] + at // (batch * heads))
    head, b, row_start = at % heads, at // heads % batch, block * ROWS
    kv_head, mine = head // GROUP, (b, head, row_start, num_rows)
    k, v = head_of(k, strides[1], b, kv_head), head_of(v, strides[2], b, kv_head)
    of_out, stride = in_dense(b, head, heads, num_rows, V_DIM)
    rows, line = row_start + tl.arange(0, ROWS), (b * heads + head).to(tl.int64) * num_rows
    queries = load_block(
        head_of(q, strides[0], b, head),
        row_start,
        (0, num_rows),
        strides[0][1],
        ROWS,
        DIM,
        BLOCK_DIM,
    )
    if old is None:
        top = tl.full([ROWS], float("-inf"), tl.float32)
        acc = tl.zeros([ROWS, BLOCK_V_DIM], tl.float32)
    else:
        # A state is what one key of score lse and value out would have made.
        top = tl.load(lse + line + rows, mask=rows < num_rows, other=float("-inf")) * LOG2E
        acc = load_block(old + of_out, row_start, (0, num_rows), stride, ROWS, V_DIM, BLOCK_V_DIM)
    total = tl.where(top == float("-inf"), 0.0, 1.0)
    for entry in range(tl.load(table[1] + block), tl.load(table[1] + block + 1)):
        band, span = load_entry(table[0], entry)
        for start in tl.range(span[1], span[2], COLS):
            keys = load_dense(k, k_tiles, (b, kv_head), start, strides[1][1], COLS, DIM, BLOCK_DIM)
            raw = raw_scores(queries, keys, factors[0], SOFTCAP)
            new = tl.maximum(top, tl.max(raw, 1) * factors[1])
            weights = tl.exp2(raw * factors[1] - new[:, None])
            values = load_dense(
                v, v_tiles, (b, kv_head), start, strides[2][1], COLS, V_DIM, BLOCK_V_DIM
            )
            acc, total, top = absorb(
                acc,
                total,
                top,
                new,
                new,
                weights,
                values,
                (drop, mine, (start, start + COLS)),
                ROWS,
                COLS,
            )
        for n in tl.range(num_masked(span, COLS)):
            start = masked_start(n, span, COLS)
            keys = load_block(k, start, (span[0], span[3]), strides[1][1], COLS, DIM, BLOCK_DIM)
            scores = raw_scores(queries, keys, factors[0], SOFTCAP) * factors[1]
            scores = tl.where(visible(rows, start, COLS, band, span), scores, float("-inf"))
            new = tl.maximum(top, tl.max(scores, 1))
            # A row that has seen nothing yet: -inf less -inf is NaN.
            floor = tl.where(new == float("-inf"), 0.0, new)
            weights = tl.exp2(scores - floor[:, None])
            values = load_block(
                v, start, (span[0], span[3]), strides[2][1], COLS, V_DIM, BLOCK_V_DIM
            )
            acc, total, top = absorb(
                acc,
                total,
                top,
                new,
                floor,
                weights,
                values,
                (drop, mine, (start, span[3])),
                ROWS,
                COLS,
            )
    # Of a row that has seen nothing, top is -inf and total 0.
    total = tl.where(top == float("-inf"), 1.0, total)
    # Warps may have read each other's rows of lse, which this overwrites.
    tl.debug_barrier()
    store_block(
        out + of_out, acc / total[:, None], row_start, num_rows, stride, ROWS, V_DIM, BLOCK_V_DIM
    )
    tl.store(lse + line + rows, (top + tl.log2(total)) / LOG2E, mask=rows < num_rows)


@triton.jit
def absorb(
    acc, total, top, new, floor, weights, values, chance, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """The sums of weighted values and of weights with one more block of keys, whose weights are
    relative to `floor`, and the new maximum; `chance` is the dropout, rows and columns of
    `dropped`.
    """
    fade = tl.exp2(top - floor)
    total = total * fade + tl.sum(weights, 1)
    left = dropped(weights, chance[0], chance[1], chance[2], False, ROWS, COLS)
    acc = acc * fade[:, None]
    return tl.dot(left.to(values.dtype), values, acc, input_precision="ieee"), total, new
