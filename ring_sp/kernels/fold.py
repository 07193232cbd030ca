"""Join the results of several calls of a library into those of a pass round the ring."""

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


def zero_sums(buffers: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Zeros in the accumulation dtype for dk and dv; the buffers themselves if they have it."""
    dtype = accumulation_dtype(buffers[0].dtype)
    dk, dv = (x.zero_() if x.dtype == dtype else torch.zeros_like(x, dtype=dtype) for x in buffers)
    return dk, dv


def settle(sums: tuple[Tensor, Tensor], buffers: tuple[Tensor, Tensor]) -> None:
    """Copy what is not in its buffer yet."""
    for x, buffer in zip(sums, buffers, strict=True):
        if x.data_ptr() != buffer.data_ptr():
            buffer.copy_(x)
