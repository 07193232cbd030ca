"""The search for the longest sequence: few trials, and the right answer."""

from collections.abc import Callable

import pytest
from search_length import Asked, Trial, longest, propose, shortest_failed

MEMORY: dict[str, Callable[[int], float]] = {
    "affine": lambda tokens: 15e9 + 130e3 * tokens,
    "a square": lambda tokens: 15e9 + 90e3 * tokens + 2000 * tokens**2,
    "flat, then affine": lambda tokens: max(20e9, 12e9 + 65e3 * tokens),
    "with gaps": lambda tokens: 15e9 + 130e3 * tokens * (1 + 0.01 * (tokens // 256 % 3)),
}


def searched(memory: Callable[[int], float], asked: Asked, told: bool) -> list[Trial]:
    """`told` if a trial that does not fit still says how much it held, as on CPUs."""
    trials: list[Trial] = []
    while (tokens := propose(trials, asked)) is not None:
        assert tokens % asked.granule == 0 and tokens not in {trial.tokens for trial in trials}
        held, fits = int(memory(tokens)), memory(tokens) <= asked.limit
        trials.append(Trial(tokens, fits, held if fits or told else 0))
        assert len(trials) < 30
    return trials


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("kind", MEMORY)
def test_the_longest_is_found_in_few_trials_of_which_few_fail(kind: str, told: bool) -> None:
    memory, asked = MEMORY[kind], Asked(int(40e9), 1024, 256)
    trials = searched(memory, asked, told)
    best, over = longest(trials), shortest_failed(trials)
    assert over is not None and memory(best) <= asked.limit < memory(over)
    assert over - best <= max(256, 0.02 * best)
    # Lengths that say nothing are short ones, and a line begins where they end.
    most, failed = (16, 5) if kind.startswith("flat") else (10, 3)
    assert len(trials) <= most and sum(not trial.fits for trial in trials) <= failed


def test_where_the_first_length_fails_shorter_ones_are_tried() -> None:
    asked = Asked(1000, 4096, 64)
    trials = searched(lambda tokens: tokens, asked, False)
    assert [trial.tokens for trial in trials[:4]] == [4096, 2048, 1024, 512]
    assert 1000 - 64 < longest(trials) <= 1000
    none = searched(lambda _: 2000, asked, False)
    assert longest(none) == 0 and none[-1].tokens == 64
    assert propose([], Asked(1000, 32, 64)) == 64
