"""What the Triton kernels share: loads that cannot overrun, scores, and the walk over a table."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ring_sp.kernels import tile_table
from ring_sp.kernels.contract import Step

LOG2E = tl.constexpr(1.4426950408889634)
ALIGN = tl.constexpr(tile_table.ALIGN)


class Shape(NamedTuple):
    """What a launch is built from: rows and columns of a block, warps, pipeline stages, and whether
    blocks are read through tensor descriptors.
    """

    rows: int
    cols: int
    warps: int
    stages: int
    descriptors: bool = False


def padded(dim: int) -> int:
    """The least power of two that a matrix product takes and that holds `dim`."""
    return max(triton.next_power_of_2(dim), 16)


def strides(x: Tensor) -> tuple[int, int, int]:
    """Of [B, S, H, D] but for D, which is dense."""
    batch, row, head, _ = x.stride()
    return batch, row, head


def score_factors(scale: float, softcap: float | None) -> tuple[float, float]:
    """(a, b) such that the score in units of log 2 is tanh(a * q.k) * b, or without softcap
    q.k * b.
    """
    if softcap is None:
        return 1.0, scale * LOG2E.value
    return scale / softcap, softcap * LOG2E.value


def descriptor(x: Tensor, rows: int, shape: Shape) -> TensorDescriptor | None:
    """Of [B, S, H, D] for blocks of `rows` slots of a head, if the shape asks for one and the
    strides allow it.
    """
    step = 16 // x.element_size()
    aligned = all(stride % step == 0 for stride in x.stride()[:3]) and x.data_ptr() % 16 == 0
    if not shape.descriptors or not aligned:
        return None
    by_head = x.transpose(1, 2)
    block = [1, 1, rows, padded(x.shape[3])]
    return TensorDescriptor(x, list(by_head.shape), list(by_head.stride()), block)


def line_descriptor(x: Tensor, cols: int, shape: Shape) -> TensorDescriptor | None:
    """Of a dense [B, H, S], for stretches of `cols` slots."""
    aligned = x.data_ptr() % 16 == 0 and x.shape[2] % ALIGN.value == 0
    if not shape.descriptors or not aligned or x.numel() >= 1 << 31:
        return None
    return TensorDescriptor(x, [x.numel()], [1], [cols])


@triton.jit
def head_of(x, strides, b, head):
    """Where a head of [B, S, H, D] starts."""
    return x + b.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[2]


@triton.jit
def in_dense(b, head, heads, num_rows, DIM: tl.constexpr):
    """Where a head of a dense [B, S, H, DIM] starts, and how far its rows are apart."""
    stride = (heads * DIM).to(tl.int64)
    return b * num_rows * stride + head * DIM, stride


@triton.jit
def load_block(
    base, start, bounds, stride, BLOCK: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr
):
    """Rows start .. start + BLOCK - 1 of a [rows, DIM] matrix, with zeros outside of bounds[0] ..
    bounds[1] - 1 and past DIM.
    """
    rows = start + tl.arange(0, BLOCK)
    dims = tl.arange(0, BLOCK_DIM)
    mask = ((rows >= bounds[0]) & (rows < bounds[1]))[:, None]
    if BLOCK_DIM != DIM:
        mask = mask & (dims < DIM)[None, :]
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + dims[None, :], mask=mask, other=0.0)


@triton.jit
def store_block(
    base, x, start, stop, stride, BLOCK: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr
):
    """Write what exists of such a block."""
    rows = start + tl.arange(0, BLOCK)
    dims = tl.arange(0, BLOCK_DIM)
    mask = rows[:, None] < stop
    if BLOCK_DIM != DIM:
        mask = mask & (dims < DIM)[None, :]
    to = base + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    tl.store(to, x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_dense(
    base, tiles, at, start, stride, BLOCK: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr
):
    """`load_block` where all rows exist; `tiles`, if any, is a descriptor of [B, H, rows, DIM] and
    `at` the (B, H) of `base`.
    """
    if tiles is None:
        x = load_block(base, start, (start, start + BLOCK), stride, BLOCK, DIM, BLOCK_DIM)
    else:
        x = tiles.load([at[0], at[1], start, 0]).reshape(BLOCK, BLOCK_DIM)
    return x


@triton.jit
def load_line(base, tiles, line, start, stop, COLS: tl.constexpr):
    """COLS slots of a dense [B, H, S] from `start` of the head at `line`, and zeros from `stop`
    on; `tiles`, if any, is a descriptor of those of which all exist.
    """
    if tiles is None:
        cols = start + tl.arange(0, COLS)
        x = tl.load(base + line + cols, mask=cols < stop, other=0.0)
    else:
        x = tiles.load([(line + start).to(tl.int32)])
    return x


@triton.jit
def tanh(x):
    """Of float32."""
    # exp2 of 88 overflows nothing, and tanh is 1 long before.
    return 1 - 2 / (tl.exp2(tl.minimum(x, 30.0) * (2 * LOG2E)) + 1)


@triton.jit
def raw_scores(a, b, inner, SOFTCAP: tl.constexpr):
    """a @ b.T, such that times a factor it is the score in units of log 2."""
    raw = tl.dot(a, b.T, input_precision="ieee")
    if SOFTCAP:
        raw = tanh(raw * inner)
    return raw


Drop = tuple[Tensor, Tensor, int, int, float, int, int]
"""What kernels know of `dropout.Dropout`: positions of queries and of keys, seed, threshold, what
is left divided by this, first head, heads.
"""


def drop_of(step: Step) -> Drop | None:
    """The dropout of a step, if it has one."""
    dropout = step.dropout
    if dropout is None:
        return None
    return (
        dropout.q_positions,
        dropout.k_positions,
        dropout.seed,
        dropout.threshold,
        1 - dropout.p,
        dropout.first_head,
        dropout.num_heads,
    )


@triton.jit
def positions_at(positions, start, stop, BLOCK: tl.constexpr):
    """Of BLOCK slots from `start`; 0 from `stop` on."""
    at = start + tl.arange(0, BLOCK)
    return tl.load(positions + at, mask=at < stop, other=0)


@triton.jit
def dropped(x, drop, rows, cols, KEYS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """What dropout, if there is any, leaves of weights [ROWS, COLS]: `rows` are (entry, head,
    start, stop) and `cols` (start, stop); KEYS tells that the rows are keys.
    """
    if drop is not None:
        row_places = positions_at(drop[1] if KEYS else drop[0], rows[2], rows[3], ROWS)[:, None]
        col_places = positions_at(drop[0] if KEYS else drop[1], cols[0], cols[1], COLS)[None, :]
        one, other = row_places + 0 * col_places, col_places + 0 * row_places
        line = (rows[0] * drop[6] + drop[5] + rows[1]).to(tl.int32)
        numbers, _, _, _ = tl.philox(
            drop[2], other if KEYS else one, one if KEYS else other, line, 0
        )
        x = tl.where((numbers >> 1).to(tl.int32) >= drop[3], x / drop[4], 0.0)
    return x


@triton.jit
def load_entry(entries, at):
    """A row of a `TileTable`: the band, and the span of columns."""
    entry = entries + at * 8
    return (
        (tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)),
        (tl.load(entry + 4), tl.load(entry + 5), tl.load(entry + 6), tl.load(entry + 7)),
    )


@triton.jit
def num_masked(span, COLS: tl.constexpr):
    """Blocks of columns that need a mask."""
    start, full_start, full_stop, stop = span
    return (full_start - start // ALIGN * ALIGN) // COLS + tl.cdiv(stop - full_stop, COLS)


@triton.jit
def masked_start(n, span, COLS: tl.constexpr):
    """Where the n-th of them starts."""
    start, full_start, full_stop, _ = span
    first = start // ALIGN * ALIGN
    before = (full_start - first) // COLS
    return tl.where(n < before, first + n * COLS, full_stop + (n - before) * COLS)


@triton.jit
def visible(rows, start, COLS: tl.constexpr, band, span):
    """Which of `rows` and COLS columns from `start` see each other [rows, COLS]."""
    row_start, row_stop, lo, hi = band
    cols = start + tl.arange(0, COLS)
    offset = rows[:, None] - cols[None, :]
    row_seen = ((rows >= row_start) & (rows < row_stop))[:, None]
    col_seen = ((cols >= span[0]) & (cols < span[3]))[None, :]
    return (offset >= lo) & (offset <= hi) & row_seen & col_seen
