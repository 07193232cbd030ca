"""Join the results of several calls of a library into those of a pass round the ring."""

from itertools import pairwise

import torch
from torch import Tensor

from ring_sp.kernels.contract import State, accumulation_dtype
from ring_sp.kernels.merge import merge
from ring_sp.kernels.triton_found import missing


def fold(state: State | None, part: State, rows: slice, num_rows: int, dtype: torch.dtype) -> State:
    """The state with a part over the query rows `rows`, of `num_rows` in all; reuses the state.

    Its out is in `dtype`, but a part over all rows that comes first is the state as it is.
    """
    out, lse = part
    every = (rows.start, rows.stop) == (0, num_rows)
    if state is None and every:
        return part
    if out.is_cuda and not missing():
        from ring_sp.kernels import triton_merge

        return triton_merge.fold(state, part, rows, num_rows, dtype)
    if state is None:
        batch, _, heads, dim = out.shape
        state = (
            out.new_zeros(batch, num_rows, heads, dim, dtype=dtype),
            lse.new_full((batch, heads, num_rows), -torch.inf),
        )
        state[0][:, rows], state[1][:, :, rows] = part
        return state
    sums, lses = state[0].to(accumulation_dtype(out.dtype)), state[1]
    if every:
        sums, lses = merge(sums, lses, out, lse)
    else:
        sums[:, rows], lses[:, :, rows] = merge(sums[:, rows], lses[:, :, rows], out, lse)
    return sums.to(dtype), lses


def fold_gradient(
    total: Tensor | None, part: Tensor, rows: slice, num_rows: int, dtype: torch.dtype
) -> Tensor:
    """The same for a gradient of the queries, which is a plain sum."""
    if total is None and (rows.start, rows.stop) == (0, num_rows):
        return part
    if total is None:
        total = part.new_zeros(part.shape[0], num_rows, *part.shape[2:], dtype=dtype)
        total[:, rows] = part
        return total
    joint = total if total.dtype == dtype else total.to(dtype)
    # The sum is formed in float32 and rounded once, whatever the dtypes.
    torch.add(total[:, rows], part, out=joint[:, rows])
    return joint


def zero_sums(
    buffers: tuple[Tensor, Tensor], stretches: list[slice]
) -> tuple[Tensor, Tensor] | None:
    """Zeros in the accumulation dtype for dk and dv, to which parts over `stretches` of columns are
    added; the buffers themselves if they have it.

    None where no column has two parts, which then go straight into the buffers: they are zeroed
    where there is none.
    """
    ordered = sorted((x.start, x.stop) for x in stretches)
    edges = [(0, 0), *ordered, (buffers[0].shape[1],) * 2]
    gaps = [(stop, start) for (_, stop), (start, _) in pairwise(edges)]
    if any(stop < start for start, stop in gaps):
        dtype = accumulation_dtype(buffers[0].dtype)
        dk, dv = (
            x.zero_() if x.dtype == dtype else torch.zeros_like(x, dtype=dtype) for x in buffers
        )
        return dk, dv
    for start, stop in gaps:
        for x in buffers if start < stop else ():
            x[:, start:stop].zero_()
    return None


def settle(sums: tuple[Tensor, Tensor], buffers: tuple[Tensor, Tensor]) -> None:
    """Copy what is not in its buffer yet."""
    for x, buffer in zip(sums, buffers, strict=True):
        if x.data_ptr() != buffer.data_ptr():
            buffer.copy_(x)
