"""`triton_backward` for Hopper, as `triton_hopper` is the forward: a warp copies, and two groups of
four warps take half of a block's rows each (arXiv:2407.08608, section 3). Still without atomics.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ring_sp.kernels.contract import Step
from ring_sp.kernels.tile_table import ALIGN, tile_table
from ring_sp.kernels.triton_backward import Pair
from ring_sp.kernels.triton_blocks import strides
from ring_sp.kernels.triton_hopper import (
    LOG2E,
    async_load,
    block_start,
    clear,
    descriptor,
    fits,
    hide,
    num_blocks,
    num_full,
    scores_layout,
)

HALF = gl.constexpr(64)
ROWS = 128
# More columns spill registers; a third stage gained nothing (dk and dv, dim 128, 16k, H200).
KEY_COLS, QUERY_COLS, STAGES = 64, 128, 2


def serves(dout: Tensor, q: Tensor, kv: Pair, rows: Pair, step: Step) -> bool:
    """Whether it can stand in for `triton_backward`, on a Hopper GPU; `rows` are lse and delta."""
    return fits((q, *kv, dout), step) and all(
        x.data_ptr() % 16 == 0 and x.shape[2] % ALIGN == 0 and x.numel() < 1 << 31 for x in rows
    )


def query_gradients(
    dout: Tensor, q: Tensor, kv: Pair, rows: Pair, step: Step, dq: Tensor | None
) -> Tensor:
    """dq of `contract.Kernel.backward`; only of what it serves."""
    (k, v), (lse, delta) = kv, (x.contiguous() for x in rows)
    batch, num_rows, heads, dim = q.shape
    table = tile_table(step, q.device, num_rows, (ROWS, QUERY_COLS))
    dtype = q.dtype if step.final else torch.float32
    if dq is not None and dq.dtype == dtype:
        total, num_blocks = dq, table.num_active
    else:
        total, num_blocks = q.new_empty(batch, num_rows, heads, dim, dtype=dtype), len(table.order)
    query_kernel[(num_blocks * batch * heads,)](
        (lse, delta, total, total if dq is None else dq),
        descriptor(q, HALF.value),
        descriptor(dout, HALF.value),
        descriptor(k, QUERY_COLS),
        descriptor(v, QUERY_COLS),
        table[:3],
        (batch, heads, num_rows),
        heads // k.shape[2],
        (step.scale * LOG2E.value, step.scale),
        STAGES,
        dq is not None,
        num_warps=4,
        # As in the forward.
        maxnreg=168,
    )
    return total


def key_gradients(dout: Tensor, q: Tensor, kv: Pair, rows: Pair, step: Step, dkv: Pair) -> None:
    """dk and dv of `contract.Kernel.backward`; only of what it serves."""
    (k, v), (lse, delta), (dk, dv) = kv, (x.contiguous() for x in rows), dkv
    batch, num_keys, kv_heads, _ = k.shape
    table = tile_table(step, q.device, num_keys, (ROWS, KEY_COLS), keys=True)
    key_kernel[(len(table.order) * batch * kv_heads,)](
        (dk, dv),
        descriptor(k, HALF.value),
        descriptor(v, HALF.value),
        descriptor(q, KEY_COLS),
        descriptor(dout, KEY_COLS),
        _line_descriptor(lse, KEY_COLS),
        _line_descriptor(delta, KEY_COLS),
        table[:3],
        (strides(dk), strides(dv)),
        (batch, kv_heads, num_keys, q.shape[1]),
        q.shape[2] // kv_heads,
        (step.scale * LOG2E.value, step.scale),
        STAGES,
        num_warps=4,
        maxnreg=168,
    )


def _line_descriptor(x: Tensor, cols: int) -> TensorDescriptor:
    """Of a dense float32 [B, H, S], for stretches of `cols` slots."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    return TensorDescriptor(x, [x.numel()], [1], [cols], layout)


@gluon.jit
def room(desc, number: gl.constexpr):
    """For `number` blocks of a descriptor."""
    shape: gl.constexpr = [number] + desc.block_shape  # noqa: RUF005, Gluon knows no star
    return gl.allocate_shared_memory(desc.dtype, shape, desc.layout)


@gluon.jit
def barriers(number: gl.constexpr, arrivals: gl.constexpr):
    """`number` of them, that `arrivals` open."""
    found = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(number):
        mbarrier.init(found.index(n), count=arrivals)
    fence_async_shared()
    return found


@gluon.jit
def key_kernel(
    grads,
    k_desc,
    v_desc,
    q_desc,
    dout_desc,
    lse_desc,
    delta_desc,
    table,
    strides,
    sizes,
    GROUP,
    factors,
    STAGES: gl.constexpr,
):
    """dk and dv of a block of keys, summed over the query heads that read them. The table's rows
    are the keys.
    """
    entries, offsets, order = table
    batch, kv_heads, num_keys, num_rows = sizes
    at = gl.program_id(0)
    block = gl.load(order + at // (batch * kv_heads))
    rows = (room(k_desc, 2), room(v_desc, 2))
    cols = (room(q_desc, STAGES), room(dout_desc, STAGES))
    lines = (room(lse_desc, STAGES), room(delta_desc, STAGES))
    rings = (barriers(STAGES, 1), barriers(STAGES, 2), barriers(STAGES, 1), barriers(STAGES, 2))
    shared = (rows, cols, lines, barriers(1, 1), rings)
    walked = (entries, gl.load(offsets + block), gl.load(offsets + block + 1), GROUP)
    place = (at // kv_heads % batch, at % kv_heads, block * (2 * HALF))
    descs = (k_desc, v_desc, q_desc, dout_desc, lse_desc, delta_desc)
    held = (grads, strides, num_keys, factors)
    gl.warp_specialize(
        [
            (consume_queries, (0, shared, walked, place, held)),
            (consume_queries, (1, shared, walked, place, held)),
            (produce_queries, (shared, walked, place, descs, (kv_heads, num_rows))),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def produce_queries(shared, walked, place, descs, sizes):
    """Copy this block's keys and values, and all blocks of queries that see them."""
    k_desc, v_desc, q_desc, dout_desc, lse_desc, delta_desc = descs
    rows, cols, lines, rows_ready, rings = shared
    q_buf, dout_buf = cols
    q_ready, q_free, dout_ready, dout_free = rings
    entries, first, last, group = walked
    b, kv_head, key_start = place
    kv_heads, num_rows = sizes
    stages: gl.constexpr = q_buf.shape[0]
    num_cols: gl.constexpr = q_buf.shape[3]
    produce_rows(rows, (k_desc, v_desc), b, kv_head, key_start, rows_ready.index(0))
    count = 0
    for member in range(group):
        head = kv_head * group + member
        line = (b * kv_heads * group + head) * num_rows
        for number in range(first, last):
            entry = entries + number * 8
            for n in range(num_blocks(entry, num_cols)):
                start = block_start(entry, n, num_cols)
                slot, phase = count % stages, (count // stages) & 1
                to = q_ready.index(slot)
                mbarrier.wait(q_free.index(slot), phase ^ 1)
                mbarrier.expect(to, num_cols * (q_buf.shape[4] * 2 + 4))
                async_load(q_desc, [b, head, start, 0], to, q_buf.index(slot))
                async_load(lse_desc, [line + start], to, lines[0].index(slot))
                to = dout_ready.index(slot)
                mbarrier.wait(dout_free.index(slot), phase ^ 1)
                mbarrier.expect(to, num_cols * (dout_buf.shape[4] * 2 + 4))
                async_load(dout_desc, [b, head, start, 0], to, dout_buf.index(slot))
                async_load(delta_desc, [line + start], to, lines[1].index(slot))
                count += 1


@gluon.jit
def produce_rows(buffers, descs, b, head, start, ready):
    """Copy both halves of a block of rows of two tensors."""
    dims: gl.constexpr = descs[0].block_shape[3] + descs[1].block_shape[3]
    mbarrier.expect(ready, 2 * HALF * dims * 2)
    for part in gl.static_range(2):
        at = [b, head, start + part * HALF, 0]
        async_load(descs[0], at, ready, buffers[0].index(part))
        async_load(descs[1], at, ready, buffers[1].index(part))


@gluon.jit
def consume_queries(part, shared, walked, place, held):
    """dk and dv of half of the keys."""
    grads, strides, num_keys, factors = held
    b, kv_head, key_start = place
    dim: gl.constexpr = shared[0][0].shape[4]
    v_dim: gl.constexpr = shared[0][1].shape[4]
    row_start = key_start + part * HALF
    dkeys = gl.zeros([HALF, dim], gl.float32, scores_layout(dim))
    dvalues = gl.zeros([HALF, v_dim], gl.float32, scores_layout(v_dim))
    if walked[1] < walked[2]:
        dkeys, dvalues = walk_queries(part, (dkeys, dvalues), shared, walked, row_start, factors[0])
    dk = grads[0] + b.to(gl.int64) * strides[0][0] + kv_head.to(gl.int64) * strides[0][2]
    dv = grads[1] + b.to(gl.int64) * strides[1][0] + kv_head.to(gl.int64) * strides[1][2]
    store_rows(dk, dkeys * factors[1], dk, row_start, num_keys, strides[0][1], False)
    store_rows(dv, dvalues, dv, row_start, num_keys, strides[1][1], False)


@gluon.jit
def walk_queries(part, sums, shared, walked, row_start, factor):
    """All blocks of queries, of all heads. Scores and their gradients are transposed: as they come,
    they are operands of the products that dk and dv add up.
    """
    dkeys, dvalues = sums
    of_rows, of_cols, lines, rows_ready, rings = shared
    q_ready, q_free, dout_ready, dout_free = rings
    stages: gl.constexpr = of_cols[0].shape[0]
    num_cols: gl.constexpr = of_cols[0].shape[3]
    layout: gl.constexpr = scores_layout(num_cols)
    by_col: gl.constexpr = gl.SliceLayout(0, layout)
    rows = row_start + gl.arange(0, HALF, gl.SliceLayout(1, layout))
    keys, values = matrix(of_rows[0], part), matrix(of_rows[1], part)
    number, n, full, end = first_block(walked, num_cols)
    mbarrier.wait(rows_ready.index(0), 0)
    for count in range(all_blocks(walked, num_cols) * walked[3]):
        entry = walked[0] + number * 8
        slot, phase = count % stages, (count // stages) & 1
        queries, grads = matrix(of_cols[0], slot), matrix(of_cols[1], slot)
        mbarrier.wait(q_ready.index(slot), phase)
        clear(queries, entry, n, full, num_cols)
        scores = multiply(keys, queries)
        mbarrier.wait(dout_ready.index(slot), phase)
        clear(grads, entry, n, full, num_cols)
        dweights = multiply(values, grads)
        norm = gl.expand_dims(lines[0].index(slot).load(by_col) * LOG2E, 0)
        scores = warpgroup_mma_wait(1, deps=[scores])
        weights = gl.exp2(scores * factor - norm)
        weights = hide(weights, entry, n, full, rows, num_cols, 0.0)
        p = operand(weights, grads)
        dvalues = warpgroup_mma(p, grads, dvalues, is_async=True)
        bias = gl.expand_dims(lines[1].index(slot).load(by_col), 0)
        dweights = warpgroup_mma_wait(1, deps=[dweights])
        dscores = hide(weights * (dweights - bias), entry, n, full, rows, num_cols, 0.0)
        ds = operand(dscores, queries)
        dkeys = warpgroup_mma(ds, queries, dkeys, is_async=True)
        dvalues, p = warpgroup_mma_wait(1, deps=[dvalues, p])
        mbarrier.arrive(dout_free.index(slot), count=1)
        dkeys, ds = warpgroup_mma_wait(0, deps=[dkeys, ds])
        mbarrier.arrive(q_free.index(slot), count=1)
        number, n, full, end = next_block(walked, number, n, full, end, num_cols)
    return dkeys, dvalues


@gluon.jit
def all_blocks(walked, COLS: gl.constexpr):
    """How many blocks of columns the entries of this block of rows have."""
    num = 0
    for number in range(walked[1], walked[2]):
        num += num_blocks(walked[0] + number * 8, COLS)
    return num


@gluon.jit
def first_block(walked, COLS: gl.constexpr):
    """An entry, a block in it, and how many blocks it has without a mask and in all."""
    entry = walked[0] + walked[1] * 8
    return walked[1], 0, num_full(entry, COLS), num_blocks(entry, COLS)


@gluon.jit
def next_block(walked, number, n, full, end, COLS: gl.constexpr):
    """The same of the block after it, and of the first after the last."""
    n += 1
    if n == end:
        number, n = gl.where(number + 1 == walked[2], walked[1], number + 1), 0
        full, end = num_full(walked[0] + number * 8, COLS), num_blocks(walked[0] + number * 8, COLS)
    return number, n, full, end


@gluon.jit
def matrix(buffer, at):
    """A block in shared memory, without the dimensions of batch and head."""
    return buffer.index(at).reshape([buffer.shape[3], buffer.shape[4]])


@gluon.jit
def multiply(a, b):
    """Start a @ b.T."""
    num_cols: gl.constexpr = b.shape[0]
    zeros = gl.zeros([HALF, num_cols], gl.float32, scores_layout(num_cols))
    return warpgroup_mma(a, b.permute([1, 0]), zeros, use_acc=False, is_async=True)


@gluon.jit
def operand(x, b):
    """The left operand, from registers, of a product with b."""
    dim: gl.constexpr = b.shape[1]
    return gl.convert_layout(x.to(b.dtype), gl.DotOperandLayout(0, scores_layout(dim), 2))


@gluon.jit
def store_rows(to, x, old, start, stop, stride, HAS_OLD: gl.constexpr):
    """Write what exists of the rows from `start` of a matrix, plus those of another, if any."""
    dim: gl.constexpr = x.shape[1]
    layout: gl.constexpr = scores_layout(dim)
    rows = start + gl.arange(0, HALF, gl.SliceLayout(1, layout))
    dims = gl.arange(0, dim, gl.SliceLayout(0, layout))
    at = gl.expand_dims(rows.to(gl.int64) * stride, 1) + gl.expand_dims(dims, 0)
    mask = gl.expand_dims(rows < stop, 1)
    if HAS_OLD:
        x += gl.load(old + at, mask=mask, other=0.0)
    gl.store(to + at, x.to(to.dtype.element_ty), mask=mask)


@gluon.jit
def query_kernel(
    tensors,
    q_desc,
    dout_desc,
    k_desc,
    v_desc,
    table,
    sizes,
    GROUP,
    factors,
    STAGES: gl.constexpr,
    HAS_OLD: gl.constexpr,
):
    """dq of a block of rows of one head."""
    entries, offsets, order = table
    batch, heads, _ = sizes
    at = gl.program_id(0)
    block = gl.load(order + at // (batch * heads))
    head = at % heads
    rows = (room(q_desc, 2), room(dout_desc, 2))
    cols = (room(k_desc, STAGES), room(v_desc, STAGES))
    shared = (rows, cols, barriers(1, 1), barriers(STAGES, 1), barriers(STAGES, 2))
    walked = (entries, gl.load(offsets + block), gl.load(offsets + block + 1))
    place = (at // heads % batch, head, block * (2 * HALF))
    descs = (q_desc, dout_desc, k_desc, v_desc)
    held = (tensors, sizes, factors)
    gl.warp_specialize(
        [
            (consume_keys, (0, shared, walked, place, held, HAS_OLD)),
            (consume_keys, (1, shared, walked, place, held, HAS_OLD)),
            (produce_keys, (shared, walked, place, descs, head // GROUP)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def produce_keys(shared, walked, place, descs, kv_head):
    """Copy this block's queries and gradients, and all blocks of keys and values that they see."""
    q_desc, dout_desc, k_desc, v_desc = descs
    rows, cols, rows_ready, ready, free = shared
    k_buf, v_buf = cols
    entries, first, last = walked
    b, head, row_start = place
    stages: gl.constexpr = k_buf.shape[0]
    num_cols: gl.constexpr = k_buf.shape[3]
    produce_rows(rows, (q_desc, dout_desc), b, head, row_start, rows_ready.index(0))
    count = 0
    for number in range(first, last):
        entry = entries + number * 8
        for n in range(num_blocks(entry, num_cols)):
            at = [b, kv_head, block_start(entry, n, num_cols), 0]
            slot, phase = count % stages, (count // stages) & 1
            to = ready.index(slot)
            mbarrier.wait(free.index(slot), phase ^ 1)
            mbarrier.expect(to, num_cols * 2 * (k_buf.shape[4] + v_buf.shape[4]))
            async_load(k_desc, at, to, k_buf.index(slot))
            async_load(v_desc, at, to, v_buf.index(slot))
            count += 1


@gluon.jit
def consume_keys(part, shared, walked, place, held, HAS_OLD: gl.constexpr):
    """dq of half of the rows."""
    tensors, sizes, factors = held
    lse, delta, dq, old = tensors
    _, heads, num_rows = sizes
    b, head, start = place
    dim: gl.constexpr = shared[1][0].shape[4]
    layout: gl.constexpr = scores_layout(shared[1][0].shape[3])
    row_start = start + part * HALF
    acc = gl.zeros([HALF, dim], gl.float32, scores_layout(dim))
    rows = row_start + gl.arange(0, HALF, gl.SliceLayout(1, layout))
    line = (b * heads + head).to(gl.int64) * num_rows + rows
    norm = gl.load(lse + line, mask=rows < num_rows, other=float("inf")) * LOG2E
    bias = gl.load(delta + line, mask=rows < num_rows, other=0.0)
    if walked[1] < walked[2]:
        acc = walk_keys(part, acc, shared, walked, rows, (norm, bias), factors[0])
    stride = (heads * dim).to(gl.int64)
    at = b * num_rows * stride + head * dim
    store_rows(dq + at, acc * factors[1], old + at, row_start, num_rows, stride, HAS_OLD)


@gluon.jit
def walk_keys(part, acc, shared, walked, rows, lines, factor):
    """All blocks of keys."""
    of_rows, of_cols, rows_ready, ready, free = shared
    stages: gl.constexpr = of_cols[0].shape[0]
    num_cols: gl.constexpr = of_cols[0].shape[3]
    norm, bias = gl.expand_dims(lines[0], 1), gl.expand_dims(lines[1], 1)
    queries, grads = matrix(of_rows[0], part), matrix(of_rows[1], part)
    number, n, full, end = first_block(walked, num_cols)
    mbarrier.wait(rows_ready.index(0), 0)
    for count in range(all_blocks(walked, num_cols)):
        entry, slot = walked[0] + number * 8, count % stages
        keys, values = matrix(of_cols[0], slot), matrix(of_cols[1], slot)
        mbarrier.wait(ready.index(slot), (count // stages) & 1)
        clear(keys, entry, n, full, num_cols)
        scores = multiply(queries, keys)
        dweights = multiply(grads, values)
        scores = warpgroup_mma_wait(1, deps=[scores])
        weights = gl.exp2(scores * factor - norm)
        dweights = warpgroup_mma_wait(0, deps=[dweights])
        dscores = hide(weights * (dweights - bias), entry, n, full, rows, num_cols, 0.0)
        ds = operand(dscores, keys)
        acc = warpgroup_mma(ds, keys, acc, is_async=True)
        acc, ds = warpgroup_mma_wait(0, deps=[acc, ds])
        mbarrier.arrive(free.index(slot), count=1)
        number, n, full, end = next_block(walked, number, n, full, end, num_cols)
    return acc
