"""Folds of states, and where parts of dk and dv may go straight into their buffers."""

from concurrent.futures import ProcessPoolExecutor
from itertools import combinations_with_replacement, product
from multiprocessing import get_context
from time import monotonic

import pytest
import torch

from ring_sp.kernels.contract import State
from ring_sp.kernels.fold import fold, zero_sums

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


def wrong_folds(seconds: float) -> int:
    """Folds in place, all of one state and part, that did not give the bits of the first."""
    make = torch.Generator("cuda").manual_seed(0)
    state, more = (
        (
            torch.randn(2, 272, 8, 64, generator=make, device="cuda"),
            torch.randn(2, 8, 272, generator=make, device="cuda"),
        )
        for _ in range(2)
    )
    part, rows = (more[0].to(torch.bfloat16), more[1]), slice(0, 272)

    def folded() -> State:
        return fold((state[0], state[1].clone()), part, rows, 272, torch.bfloat16)

    wanted, wrong, until = [x.clone() for x in folded()], 0, monotonic() + seconds
    while monotonic() < until:
        found = [folded() for _ in range(50)]
        wrong += sum(not all(map(torch.equal, each, wanted)) for each in found)
    return wrong


@pytest.mark.gpu
def test_a_fold_is_right_where_processes_take_turns_on_a_gpu() -> None:
    # Warps that a turn has ended go on far apart.
    with ProcessPoolExecutor(8, get_context("spawn")) as pool:
        assert list(pool.map(wrong_folds, [6.0] * 8)) == [0] * 8
