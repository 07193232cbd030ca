"""`row_max.fold` in one launch over the tile table, as the forward walks it, without the values."""

import triton
import triton.language as tl
from torch import Tensor

from ring_sp.kernels.contract import Step
from ring_sp.kernels.tile_table import tile_table
from ring_sp.kernels.triton_blocks import (
    Shape,
    descriptor,
    head_of,
    load_block,
    load_dense,
    load_entry,
    masked_start,
    num_masked,
    padded,
    raw_scores,
    strides,
    visible,
)


def fold(q: Tensor, k: Tensor, step: Step, top: Tensor, shape: Shape) -> None:
    """See `row_max.fold`; `top` is dense float32. Each row belongs to one program: no atomics."""
    batch, num_rows, heads, dim = q.shape
    table = tile_table(step, q.device, num_rows, (shape.rows, shape.cols))
    row_max_kernel[(table.num_active * batch * heads,)](
        (q, k, top),
        descriptor(k, shape.cols, shape),
        table[:3],
        (strides(q), strides(k)),
        (batch, heads, num_rows),
        step.scale,
        heads // k.shape[2],
        dim,
        padded(dim),
        shape.rows,
        shape.cols,
        num_warps=shape.warps,
        num_stages=shape.stages,
    )


@triton.jit
def row_max_kernel(
    tensors,
    k_tiles,
    table,
    strides,
    sizes,
    scale,
    GROUP,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One block of rows of one head: heavy blocks of all heads come first."""
    q, k, top = tensors
    entries, offsets, order = table
    batch, heads, num_rows = sizes
    at = tl.program_id(0)
    block = tl.load(order + at // (batch * heads))
    head, b, row_start = at % heads, at // heads % batch, block * ROWS
    kv_head, bounds = head // GROUP, (0, num_rows)
    q, k = head_of(q, strides[0], b, head), head_of(k, strides[1], b, kv_head)
    rows, line = row_start + tl.arange(0, ROWS), (b * heads + head).to(tl.int64) * num_rows
    queries = load_block(q, row_start, bounds, strides[0][1], ROWS, DIM, BLOCK_DIM)
    best = tl.load(top + line + rows, mask=rows < num_rows, other=float("-inf"))
    for entry in range(tl.load(offsets + block), tl.load(offsets + block + 1)):
        band, span = load_entry(entries, entry)
        for start in tl.range(span[1], span[2], COLS):
            keys = load_dense(k, k_tiles, (b, kv_head), start, strides[1][1], COLS, DIM, BLOCK_DIM)
            scores = raw_scores(queries, keys, 1.0, False) * scale
            best = tl.maximum(best, tl.max(scores, 1))
        for n in tl.range(num_masked(span, COLS)):
            start = masked_start(n, span, COLS)
            keys = load_block(k, start, (span[0], span[3]), strides[1][1], COLS, DIM, BLOCK_DIM)
            scores = raw_scores(queries, keys, 1.0, False) * scale
            scores = tl.where(visible(rows, start, COLS, band, span), scores, float("-inf"))
            best = tl.maximum(best, tl.max(scores, 1))
    # Warps may have read each other's rows, which this overwrites.
    tl.debug_barrier()
    tl.store(top + line + rows, best, mask=rows < num_rows)
