"""`triton_forward` for Hopper, written down to its matrix and copy units: a warp copies keys, and
two groups of four warps attend half of a block's rows each (arXiv:2407.08608, section 3).
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ring_sp.kernels import tile_table
from ring_sp.kernels.contract import State, Step

LOG2E = gl.constexpr(1.4426950408889634)
ALIGN = gl.constexpr(tile_table.ALIGN)
STAGES = gl.constexpr(2)
ROWS, COLS = 128, 128

# Triton 3.6 knows it by its longer name alone.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


def serves(q: Tensor, k: Tensor, v: Tensor, step: Step) -> bool:
    """Whether it can stand in for `triton_forward`, on a Hopper GPU."""
    return fits((q, k, v), step) and step.scale > 0


def fits(tensors: tuple[Tensor, ...], step: Step) -> bool:
    """Whether the copy engine and the matrix units take them."""
    return (
        step.softcap is None
        and step.dropout is None
        and all(
            x.element_size() == 2
            and x.shape[3] in (64, 128)
            and x.data_ptr() % 16 == 0
            and all(stride % 8 == 0 for stride in x.stride()[:3])
            for x in tensors
        )
    )


def attend(q: Tensor, k: Tensor, v: Tensor, step: Step, state: State | None) -> State:
    """See `contract.Kernel.forward`; only of what it serves."""
    batch, num_rows, heads, dim = q.shape
    v_dim = v.shape[3]
    table = tile_table.tile_table(step, q.device, num_rows, (ROWS, COLS))
    dtype = q.dtype if step.final else torch.float32
    old, lse = state or (None, q.new_empty(batch, heads, num_rows, dtype=torch.float32))
    if old is not None and old.dtype == dtype:
        out, num_blocks = old, table.num_active
    else:
        out, num_blocks = q.new_empty(batch, num_rows, heads, v_dim, dtype=dtype), len(table.order)
    forward_kernel[(num_blocks * batch * heads,)](
        out,
        lse,
        lse if old is None else old,
        descriptor(q, ROWS // 2),
        descriptor(k, COLS),
        descriptor(v, COLS),
        *table[:3],
        batch,
        heads,
        num_rows,
        heads // k.shape[2],
        step.scale * LOG2E.value,
        ROWS,
        COLS,
        dim,
        v_dim,
        old is not None,
        num_warps=4,
        # Of 12 warps, 4 idle but for the one that copies; the rest take what it frees.
        maxnreg=168,
    )
    return out, lse


def descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Of [B, S, H, D] for blocks of `rows` slots of a head."""
    by_head = x.transpose(1, 2)
    block = [1, 1, rows, x.shape[3]]
    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor(x, list(by_head.shape), list(by_head.stride()), block, layout)


@gluon.jit
def forward_kernel(
    out,
    lse,
    old,
    q_desc,
    k_desc,
    v_desc,
    entries,
    offsets,
    order,
    batch,
    heads,
    num_rows,
    GROUP,
    factor,
    ROWS: gl.constexpr,
    COLS: gl.constexpr,
    DIM: gl.constexpr,
    V_DIM: gl.constexpr,
    HAS_STATE: gl.constexpr,
):
    """One block of rows of one head: heavy blocks of all heads come first."""
    at = gl.program_id(0)
    block = gl.load(order + at // (batch * heads))
    head, b = at % heads, at // heads % batch
    dtype: gl.constexpr = k_desc.dtype
    one: gl.constexpr = mbarrier.MBarrierLayout()
    buffers = (
        gl.allocate_shared_memory(dtype, [2, 1, 1, ROWS // 2, DIM], q_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, 1, 1, COLS, DIM], k_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, 1, 1, COLS, V_DIM], v_desc.layout),
    )
    q_ready = gl.allocate_shared_memory(gl.int64, [1], one)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    mbarrier.init(q_ready, count=1)
    for n in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(n), count=1)
        mbarrier.init(v_ready.index(n), count=1)
        mbarrier.init(k_free.index(n), count=2)
        mbarrier.init(v_free.index(n), count=2)
    fence_async_shared()
    shared = (buffers, (q_ready, k_ready, k_free, v_ready, v_free))
    table = (entries, gl.load(offsets + block), gl.load(offsets + block + 1))
    place = (b, head, head // GROUP, block * ROWS)
    held = ((out, lse, old), (num_rows, heads, factor))
    gl.warp_specialize(
        [
            (consume, (0, shared, table, place, held, ROWS, COLS, DIM, V_DIM, HAS_STATE)),
            (consume, (1, shared, table, place, held, ROWS, COLS, DIM, V_DIM, HAS_STATE)),
            (
                produce,
                (shared, table, place, (q_desc, k_desc, v_desc), ROWS, COLS, DIM, V_DIM),
            ),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def produce(
    shared,
    table,
    place,
    descs,
    ROWS: gl.constexpr,
    COLS: gl.constexpr,
    DIM: gl.constexpr,
    V_DIM: gl.constexpr,
):
    """Copy this block's queries, and all blocks of keys and values that they see."""
    q_buf, k_buf, v_buf = shared[0]
    q_ready, k_ready, k_free, v_ready, v_free = shared[1]
    entries, first, last = table
    b, head, kv_head, row_start = place
    half: gl.constexpr = ROWS // 2
    mbarrier.expect(q_ready, ROWS * DIM * 2)
    for part in gl.static_range(2):
        at = [b, head, row_start + part * half, 0]
        async_load(descs[0], at, q_ready, q_buf.index(part))
    count = 0
    for number in range(first, last):
        entry = entries + number * 8
        for n in range(num_blocks(entry, COLS)):
            at = [b, kv_head, block_start(entry, n, COLS), 0]
            slot, phase = count % STAGES, (count // STAGES) & 1
            mbarrier.wait(k_free.index(slot), phase ^ 1)
            mbarrier.expect(k_ready.index(slot), COLS * DIM * 2)
            async_load(descs[1], at, k_ready.index(slot), k_buf.index(slot))
            mbarrier.wait(v_free.index(slot), phase ^ 1)
            mbarrier.expect(v_ready.index(slot), COLS * V_DIM * 2)
            async_load(descs[2], at, v_ready.index(slot), v_buf.index(slot))
            count += 1


@gluon.jit
def consume(
    part,
    shared,
    table,
    place,
    held,
    ROWS: gl.constexpr,
    COLS: gl.constexpr,
    DIM: gl.constexpr,
    V_DIM: gl.constexpr,
    HAS_STATE: gl.constexpr,
):
    """Attend half of the rows."""
    out, lse, old = held[0]
    num_rows, heads, factor = held[1]
    b, head, _, row_start = place
    half: gl.constexpr = ROWS // 2
    s_rows: gl.constexpr = gl.SliceLayout(1, scores_layout(COLS))
    o_layout: gl.constexpr = scores_layout(V_DIM)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    rows = row_start + part * half + gl.arange(0, half, s_rows)
    out_rows = row_start + part * half + gl.arange(0, half, o_rows)
    dims = head * V_DIM + gl.arange(0, V_DIM, gl.SliceLayout(0, o_layout))
    stride = (heads * V_DIM).to(gl.int64)
    at = gl.expand_dims((b.to(gl.int64) * num_rows + out_rows) * stride, 1)
    at += gl.expand_dims(dims, 0)
    exist = gl.expand_dims(out_rows < num_rows, 1)
    lse += (b * heads + head).to(gl.int64) * num_rows
    if HAS_STATE:
        top = gl.load(lse + rows, mask=rows < num_rows, other=float("-inf")) * LOG2E
        total = gl.where(top == float("-inf"), 0.0, 1.0)
        acc = gl.load(old + at, mask=exist, other=0.0)
    else:
        top = gl.full([half], float("-inf"), gl.float32, s_rows)
        total = gl.full([half], 0.0, gl.float32, s_rows)
        acc = gl.zeros([half, V_DIM], gl.float32, o_layout)
    if table[1] < table[2]:
        sums = top, total, acc
        top, total, acc = walk(part, sums, shared, table, rows, factor, half, COLS, DIM, V_DIM)
    # Of a row that has seen nothing, top is -inf and total 0.
    total = gl.where(top == float("-inf"), 1.0, total)
    acc = acc / gl.expand_dims(gl.convert_layout(total, o_rows), 1)
    gl.store(out + at, acc.to(out.dtype.element_ty), mask=exist)
    gl.store(lse + rows, (top + gl.log2(total)) / LOG2E, mask=rows < num_rows)


@gluon.jit
def walk(
    part,
    sums,
    shared,
    table,
    rows,
    factor,
    ROWS: gl.constexpr,
    COLS: gl.constexpr,
    DIM: gl.constexpr,
    V_DIM: gl.constexpr,
):
    """All blocks of columns. The product with the values of one runs beside the softmax of the
    next.
    """
    top, total, acc = sums
    q_buf, k_buf, v_buf = shared[0]
    q_ready, k_ready, k_free, v_ready, v_free = shared[1]
    entries, first, last = table
    num = 0
    for number in range(first, last):
        num += num_blocks(entries + number * 8, COLS)
    q = q_buf.index(part).reshape([ROWS, DIM])
    zeros = gl.zeros([ROWS, COLS], gl.float32, scores_layout(COLS))
    entry, n = entries + first * 8, 0
    full, end = num_full(entry, COLS), num_blocks(entry, COLS)
    mbarrier.wait(q_ready, 0)
    mbarrier.wait(k_ready.index(0), 0)
    keys = k_buf.index(0).reshape([COLS, DIM]).permute([1, 0])
    scores = warpgroup_mma_wait(
        0, deps=[warpgroup_mma(q, keys, zeros, use_acc=False, is_async=True)]
    )
    mbarrier.arrive(k_free.index(0), count=1)
    scores = hide(scores, entry, n, full, rows, COLS, float("-inf"))
    weights, top, fade = soften(scores, top, factor)
    p, total, acc = rescale(weights, fade, total, acc, q.dtype, V_DIM)
    for count in range(1, num):
        slot, past = count % STAGES, (count - 1) % STAGES
        mbarrier.wait(k_ready.index(slot), (count // STAGES) & 1)
        keys = k_buf.index(slot).reshape([COLS, DIM]).permute([1, 0])
        scores = warpgroup_mma(q, keys, zeros, use_acc=False, is_async=True)
        acc = add_values(p, acc, v_buf, v_ready, count - 1, (entry, n, full), COLS, V_DIM)
        scores = warpgroup_mma_wait(1, deps=[scores])
        mbarrier.arrive(k_free.index(slot), count=1)
        n += 1
        if n == end:
            entry, n = entry + 8, 0
            full, end = num_full(entry, COLS), num_blocks(entry, COLS)
        scores = hide(scores, entry, n, full, rows, COLS, float("-inf"))
        weights, top, fade = soften(scores, top, factor)
        acc, p = warpgroup_mma_wait(0, deps=[acc, p])
        mbarrier.arrive(v_free.index(past), count=1)
        p, total, acc = rescale(weights, fade, total, acc, q.dtype, V_DIM)
    acc = add_values(p, acc, v_buf, v_ready, num - 1, (entry, n, full), COLS, V_DIM)
    acc = warpgroup_mma_wait(0, deps=[acc])
    return top, total, acc


@gluon.jit
def add_values(p, acc, v_buf, v_ready, count, block, COLS: gl.constexpr, V_DIM: gl.constexpr):
    """Start the product of the weights with the `count`-th block of values that comes."""
    values = v_buf.index(count % STAGES).reshape([COLS, V_DIM])
    mbarrier.wait(v_ready.index(count % STAGES), (count // STAGES) & 1)
    clear(values, block[0], block[1], block[2], COLS)
    return warpgroup_mma(p, values, acc, is_async=True)


@gluon.constexpr_function
def scores_layout(cols):
    """Of a product with `cols` columns, by one group of four warps."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, cols, 16])


@gluon.jit
def hide(x, entry, n, full, rows, COLS: gl.constexpr, HIDDEN: gl.constexpr):
    """`HIDDEN` where the tile hides a pair, from the `full`-th block on."""
    layout: gl.constexpr = scores_layout(COLS)
    if n >= full:
        cols = block_start(entry, n, COLS) + gl.arange(0, COLS, gl.SliceLayout(0, layout))
        offset = gl.expand_dims(rows, 1) - gl.expand_dims(cols, 0)
        row_seen = (rows >= gl.load(entry)) & (rows < gl.load(entry + 1))
        col_seen = (cols >= gl.load(entry + 4)) & (cols < gl.load(entry + 7))
        seen = (offset >= gl.load(entry + 2)) & (offset <= gl.load(entry + 3))
        seen = seen & gl.expand_dims(row_seen, 1) & gl.expand_dims(col_seen, 0)
        x = gl.where(seen, x, HIDDEN)
    return x


@gluon.jit
def soften(scores, top, factor):
    """The weights of a block of scores, the new maximum, and what the sums so far fade by."""
    new = gl.maximum(top, gl.max(scores, 1) * factor)
    floor = gl.where(new == float("-inf"), 0.0, new)
    return gl.exp2(scores * factor - gl.expand_dims(floor, 1)), new, gl.exp2(top - floor)


@gluon.jit
def rescale(weights, fade, total, acc, dtype: gl.constexpr, V_DIM: gl.constexpr):
    """The weights as an operand, their sum, and the sum of values so far at the new maximum."""
    layout: gl.constexpr = scores_layout(V_DIM)
    total = total * fade + gl.sum(weights, 1)
    acc = acc * gl.expand_dims(gl.convert_layout(fade, gl.SliceLayout(1, layout)), 1)
    return gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, layout, 2)), total, acc


@gluon.jit
def clear(values, entry, n, full, COLS: gl.constexpr):
    """Zero the values outside of a tile, which may be NaN. Both groups of warps do so."""
    if n >= full:
        start = block_start(entry, n, COLS)
        first, last = gl.load(entry + 4), gl.load(entry + 7)
        if (start < first) | (start + COLS > last):
            _clear(values, start, first, last, COLS)


@gluon.jit
def _clear(values, start, first, last, COLS: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    for at in gl.static_range(0, COLS, 16):
        piece = values.slice(at, 16)
        cols = start + at + gl.arange(0, 16, gl.SliceLayout(1, layout))
        x = piece.load(layout)
        seen = gl.expand_dims((cols >= first) & (cols < last), 1)
        piece.store(gl.where(seen, x, gl.zeros_like(x)))
    fence_async_shared()


@gluon.jit
def num_full(entry, COLS: gl.constexpr):
    """Blocks of columns of a table's entry that need no mask."""
    return (gl.load(entry + 6) - gl.load(entry + 5)) // COLS


@gluon.jit
def num_blocks(entry, COLS: gl.constexpr):
    """All its blocks."""
    first = gl.load(entry + 4) // ALIGN * ALIGN
    full_stop = gl.load(entry + 6)
    return (full_stop - first) // COLS + gl.cdiv(gl.load(entry + 7) - full_stop, COLS)


@gluon.jit
def block_start(entry, n, COLS: gl.constexpr):
    """Of the n-th block of columns: those without a mask come first."""
    first = gl.load(entry + 4) // ALIGN * ALIGN
    full_start, full_stop = gl.load(entry + 5), gl.load(entry + 6)
    full, before = (full_stop - full_start) // COLS, (full_start - first) // COLS
    rest = n - full
    masked = gl.where(rest < before, first + rest * COLS, full_stop + (rest - before) * COLS)
    return gl.where(n < full, full_start + n * COLS, masked)
