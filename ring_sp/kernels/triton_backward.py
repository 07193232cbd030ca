"""Gradients of `triton_forward`: dk and dv in one launch, dq in another, without atomics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ring_sp.kernels.contract import Step
from ring_sp.kernels.tile_table import tile_table
from ring_sp.kernels.triton_blocks import (
    LOG2E,
    Shape,
    descriptor,
    drop_of,
    dropped,
    head_of,
    in_dense,
    line_descriptor,
    load_block,
    load_dense,
    load_entry,
    load_line,
    masked_start,
    num_masked,
    padded,
    raw_scores,
    score_factors,
    store_block,
    strides,
    visible,
)

Pair = tuple[Tensor, Tensor]


def query_gradients(
    dout: Tensor, q: Tensor, kv: Pair, rows: Pair, step: Step, dq: Tensor | None, shape: Shape
) -> Tensor:
    """dq of `contract.Kernel.backward`, by blocks of `shape.rows` queries."""
    (k, v), (lse, delta) = kv, (x.contiguous() for x in rows)
    batch, num_rows, heads, dim = q.shape
    v_dim = v.shape[3]
    table = tile_table(step, q.device, num_rows, (shape.rows, shape.cols))
    dtype = q.dtype if step.final else torch.float32
    if dq is not None and dq.dtype == dtype:
        total, num_blocks = dq, table.num_active
    else:
        total, num_blocks = q.new_empty(batch, num_rows, heads, dim, dtype=dtype), len(table.order)
    inner, factor = score_factors(step.scale, step.softcap)
    query_kernel[(num_blocks * batch * heads,)](
        (q, k, v, dout, lse, delta, total, dq),
        descriptor(k, shape.cols, shape),
        descriptor(v, shape.cols, shape),
        table[:3],
        (strides(q), strides(k), strides(v), strides(dout)),
        (batch, heads, num_rows),
        (inner, factor, step.scale),
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
    return total


def key_gradients(
    dout: Tensor, q: Tensor, kv: Pair, rows: Pair, step: Step, dkv: Pair, shape: Shape
) -> None:
    """dk and dv of `contract.Kernel.backward`, by blocks of `shape.rows` keys."""
    (k, v), (lse, delta), (dk, dv) = kv, (x.contiguous() for x in rows), dkv
    batch, num_keys, kv_heads, dim = k.shape
    v_dim = v.shape[3]
    table = tile_table(step, q.device, num_keys, (shape.rows, shape.cols), keys=True)
    inner, factor = score_factors(step.scale, step.softcap)
    key_kernel[(len(table.order) * batch * kv_heads,)](
        (q, k, v, dout, lse, delta, dk, dv),
        descriptor(q, shape.cols, shape),
        descriptor(dout, shape.cols, shape),
        line_descriptor(lse, shape.cols, shape),
        line_descriptor(delta, shape.cols, shape),
        table[:3],
        tuple(strides(x) for x in (q, k, v, dout, dk, dv)),
        (batch, kv_heads, num_keys, q.shape[1]),
        (inner, factor, step.scale),
        drop_of(step),
        q.shape[2] // kv_heads,
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


@triton.jit
def load_lines(rows, lse_tiles, delta_tiles, line, start, stop, COLS: tl.constexpr):
    """lse in log 2 and delta, see `load_line`."""
    norm = load_line(rows[0], lse_tiles, line, start, stop, COLS)
    return norm * LOG2E, load_line(rows[1], delta_tiles, line, start, stop, COLS)


@triton.jit
def score_gradients(raw, weights, given, bias, SOFTCAP: tl.constexpr):
    """Of raw @ its factors, from the gradients of the weights."""
    gradients = weights * (given - bias)
    if SOFTCAP:
        gradients *= 1 - raw * raw
    return gradients


@triton.jit
def add_keys(
    acc,
    scores,
    kv,
    seen_by,
    chance,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """dq with the part of one block of keys: `scores` are raw scores, weights, and who sees whom
    (None: all do), `seen_by` dout and delta, `chance` the dropout, rows and columns of `dropped`.
    """
    given = tl.dot(seen_by[0], kv[1].T, input_precision="ieee")
    given = dropped(given, chance[0], chance[1], chance[2], False, ROWS, COLS)
    dscores = score_gradients(scores[0], scores[1], given, seen_by[1][:, None], SOFTCAP)
    if scores[2] is not None:
        dscores = tl.where(scores[2], dscores, 0.0)
    return tl.dot(dscores.to(kv[0].dtype), kv[0], acc, input_precision="ieee")


@triton.jit
def add_queries(
    sums,
    scores,
    values,
    seeing,
    chance,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """dk and dv with the part of one block of queries: `seeing` are q, dout and delta, the rest as
    in `add_keys`.
    """
    queries, grads, bias = seeing
    left = dropped(scores[1], chance[0], chance[1], chance[2], True, ROWS, COLS)
    dvalues = tl.dot(left.to(grads.dtype), grads, sums[1], input_precision="ieee")
    given = tl.dot(values, grads.T, input_precision="ieee")
    given = dropped(given, chance[0], chance[1], chance[2], True, ROWS, COLS)
    dscores = score_gradients(scores[0], scores[1], given, bias[None, :], SOFTCAP)
    if scores[2] is not None:
        dscores = tl.where(scores[2], dscores, 0.0)
    return tl.dot(dscores.to(queries.dtype), queries, sums[0], input_precision="ieee"), dvalues


@triton.jit
def query_kernel(
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
    """dq of a block of rows of one head."""
    q, k, v, dout, lse, delta, dq, old = tensors
    entries, offsets, order = table
    batch, heads, num_rows = sizes
    at = tl.program_id(0)
    block = tl.load(order + at // (batch * heads))
    row_start = block * ROWS
    head, b = (at % heads), (at // heads % batch)
    kv_head, mine = head // GROUP, (b, head, row_start, num_rows)
    k, v = head_of(k, strides[1], b, kv_head), head_of(v, strides[2], b, kv_head)
    of_dq, stride = in_dense(b, head, heads, num_rows, DIM)
    rows = row_start + tl.arange(0, ROWS)
    queries = load_block(
        head_of(q, strides[0], b, head),
        row_start,
        (0, num_rows),
        strides[0][1],
        ROWS,
        DIM,
        BLOCK_DIM,
    )
    grads = load_block(
        head_of(dout, strides[3], b, head),
        row_start,
        (0, num_rows),
        strides[3][1],
        ROWS,
        V_DIM,
        BLOCK_V_DIM,
    )
    exist, line = rows < num_rows, (b * heads + head).to(tl.int64) * num_rows
    norm = tl.load(lse + line + rows, mask=exist, other=float("inf")) * LOG2E
    bias = tl.load(delta + line + rows, mask=exist, other=0.0)
    acc = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    for entry in range(tl.load(offsets + block), tl.load(offsets + block + 1)):
        band, span = load_entry(entries, entry)
        for start in tl.range(span[1], span[2], COLS):
            keys = load_dense(k, k_tiles, (b, kv_head), start, strides[1][1], COLS, DIM, BLOCK_DIM)
            values = load_dense(
                v, v_tiles, (b, kv_head), start, strides[2][1], COLS, V_DIM, BLOCK_V_DIM
            )
            raw = raw_scores(queries, keys, factors[0], SOFTCAP)
            weights = tl.exp2(raw * factors[1] - norm[:, None])
            acc = add_keys(
                acc,
                (raw, weights, None),
                (keys, values),
                (grads, bias),
                (drop, mine, (start, start + COLS)),
                SOFTCAP,
                ROWS,
                COLS,
            )
        for n in tl.range(num_masked(span, COLS)):
            start = masked_start(n, span, COLS)
            keys = load_block(k, start, (span[0], span[3]), strides[1][1], COLS, DIM, BLOCK_DIM)
            values = load_block(
                v, start, (span[0], span[3]), strides[2][1], COLS, V_DIM, BLOCK_V_DIM
            )
            raw = raw_scores(queries, keys, factors[0], SOFTCAP)
            weights = tl.exp2(raw * factors[1] - norm[:, None])
            acc = add_keys(
                acc,
                (raw, weights, visible(rows, start, COLS, band, span)),
                (keys, values),
                (grads, bias),
                (drop, mine, (start, span[3])),
                SOFTCAP,
                ROWS,
                COLS,
            )
    acc *= factors[2]
    if old is not None:
        acc += load_block(old + of_dq, row_start, (0, num_rows), stride, ROWS, DIM, BLOCK_DIM)
    store_block(dq + of_dq, acc, row_start, num_rows, stride, ROWS, DIM, BLOCK_DIM)


@triton.jit
def key_kernel(
    tensors,
    q_tiles,
    dout_tiles,
    lse_tiles,
    delta_tiles,
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
    """dk and dv of a block of keys, summed over the query heads that read them. The table's rows
    are the keys.
    """
    q, k, v, dout, lse, delta, dk, dv = tensors
    entries, offsets, order = table
    batch, kv_heads, num_keys, num_rows = sizes
    at = tl.program_id(0)
    block = tl.load(order + at // (batch * kv_heads))
    kv_head, b, key_start = at % kv_heads, at // kv_heads % batch, block * ROWS
    keys = load_block(
        head_of(k, strides[1], b, kv_head),
        key_start,
        (0, num_keys),
        strides[1][1],
        ROWS,
        DIM,
        BLOCK_DIM,
    )
    values = load_block(
        head_of(v, strides[2], b, kv_head),
        key_start,
        (0, num_keys),
        strides[2][1],
        ROWS,
        V_DIM,
        BLOCK_V_DIM,
    )
    sums = (
        tl.zeros([ROWS, BLOCK_DIM], tl.float32),
        tl.zeros([ROWS, BLOCK_V_DIM], tl.float32),
    )
    for member in range(GROUP):
        head = kv_head * GROUP + member
        of_q, of_dout = head_of(q, strides[0], b, head), head_of(dout, strides[3], b, head)
        line, mine = (
            (b * kv_heads * GROUP + head).to(tl.int64) * num_rows,
            (b, head, key_start, num_keys),
        )
        for entry in range(tl.load(offsets + block), tl.load(offsets + block + 1)):
            band, span = load_entry(entries, entry)
            for start in tl.range(span[1], span[2], COLS):
                queries = load_dense(
                    of_q, q_tiles, (b, head), start, strides[0][1], COLS, DIM, BLOCK_DIM
                )
                grads = load_dense(
                    of_dout, dout_tiles, (b, head), start, strides[3][1], COLS, V_DIM, BLOCK_V_DIM
                )
                norm, bias = load_lines(
                    (lse, delta), lse_tiles, delta_tiles, line, start, num_rows, COLS
                )
                raw = raw_scores(keys, queries, factors[0], SOFTCAP)
                weights = tl.exp2(raw * factors[1] - norm[None, :])
                sums = add_queries(
                    sums,
                    (raw, weights, None),
                    values,
                    (queries, grads, bias),
                    (drop, mine, (start, start + COLS)),
                    SOFTCAP,
                    ROWS,
                    COLS,
                )
            for n in tl.range(num_masked(span, COLS)):
                start = masked_start(n, span, COLS)
                queries = load_block(
                    of_q, start, (span[0], span[3]), strides[0][1], COLS, DIM, BLOCK_DIM
                )
                grads = load_block(
                    of_dout, start, (span[0], span[3]), strides[3][1], COLS, V_DIM, BLOCK_V_DIM
                )
                norm, bias = load_lines((lse, delta), None, None, line, start, span[3], COLS)
                raw = raw_scores(keys, queries, factors[0], SOFTCAP)
                seen = visible(key_start + tl.arange(0, ROWS), start, COLS, band, span)
                weights = tl.where(seen, tl.exp2(raw * factors[1] - norm[None, :]), 0.0)
                sums = add_queries(
                    sums,
                    (raw, weights, seen),
                    values,
                    (queries, grads, bias),
                    (drop, mine, (start, span[3])),
                    SOFTCAP,
                    ROWS,
                    COLS,
                )
    dk, dv = head_of(dk, strides[4], b, kv_head), head_of(dv, strides[5], b, kv_head)
    store_block(dk, sums[0] * factors[2], key_start, num_keys, strides[4][1], ROWS, DIM, BLOCK_DIM)
    store_block(dv, sums[1], key_start, num_keys, strides[5][1], ROWS, V_DIM, BLOCK_V_DIM)
