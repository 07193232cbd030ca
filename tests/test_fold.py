"""Where parts of dk and dv may go straight into their buffers."""

from itertools import combinations_with_replacement, product

import pytest
import torch

from ring_sp.kernels.fold import zero_sums

LEN = 4
STRETCHES = [slice(a, b) for a, b in combinations_with_replacement(range(LEN + 1), 2)]


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_columns_without_a_part_are_zeros_and_none_has_two(number: int) -> None:
    """Every choice of stretches, empty, adjacent, nested and in any order."""
    for stretches in product(STRETCHES, repeat=number):
        parts = torch.zeros(LEN)
        for at in stretches:
            parts[at] += 1
        buffers = torch.ones(2, 2, LEN, 1, 1, dtype=torch.bfloat16).unbind()
        sums = zero_sums((buffers[0], buffers[1]), list(stretches))
        if sums is None:
            assert parts.max() <= 1
            assert all(((x[0, :, 0, 0] == 0) == (parts == 0)).all() for x in buffers)
        else:
            assert all(x.dtype == torch.float32 and not x.any() for x in sums)
            assert parts.max() > 1 or any(x.start == x.stop for x in stretches)
