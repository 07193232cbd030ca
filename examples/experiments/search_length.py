"""The longest sequence that fits, in few trials: memory is a smooth function of tokens."""

from dataclasses import dataclass

FIRST_SHARE, LESS = 0.98, 0.05
"""Of the limit, at which a fit aims: the allocator's gaps are not a function of tokens. Less for
each trial that failed.
"""


@dataclass(frozen=True)
class Trial:
    """A step at a length: what its GPU held at most, in bytes; `fits` if it finished below the
    limit, and `outcome` says what came of it.
    """

    tokens: int
    fits: bool
    held_bytes: int = 0
    outcome: str = "finished"
    seconds: float = 0.0


@dataclass(frozen=True)
class Asked:
    """Bytes of a GPU that may be held; the first length; lengths are multiples of `granule`, and
    the answer is sure to a share of `resolution`.
    """

    limit: int
    first: int
    granule: int
    resolution: float = 0.02


def longest(trials: list[Trial]) -> int:
    """That finished; 0 if none did."""
    return max((trial.tokens for trial in trials if trial.fits), default=0)


def shortest_failed(trials: list[Trial]) -> int | None:
    return min((trial.tokens for trial in trials if not trial.fits), default=None)


def propose(trials: list[Trial], asked: Asked) -> int | None:
    """The next length to try; None if the answer is known."""
    best, over = longest(trials), shortest_failed(trials)
    if not best:
        if over is None:
            return max(asked.granule, _floor(asked.first, asked.granule))
        return _floor(over / 2, asked.granule) or None
    step = max(asked.granule, _floor(best * asked.resolution, asked.granule))
    if over is not None and over - best <= step:
        return None
    known = sorted((trial.tokens, trial.held_bytes) for trial in trials if trial.held_bytes)
    blind = sum(not trial.held_bytes for trial in trials)
    guess = _floor(fitted(known, asked.limit * (FIRST_SHARE - LESS * blind)), asked.granule)
    if over is None:
        # Three lengths tell a parabola; a fit that sees no more room is tried once.
        return 2 * best if len(known) < 3 else max(min(guess, 16 * best), best + step)
    if best + step <= guess < over:
        return guess
    return max(best + asked.granule, _floor((best + over) / 2, asked.granule))


def fitted(points: list[tuple[int, int]], target: float) -> float:
    """Where the parabola through the last three points reaches `target`, or the line through the
    last two where it does not bend upwards; twice the last length if they do not rise.
    """
    (x1, y1), (x2, y2) = points[-2:] if len(points) > 1 else [(0, 0), points[-1]]
    slope = (y2 - y1) / (x2 - x1)
    if slope <= 0:
        return 2.0 * x2
    bend = 0.0
    if len(points) > 2:
        x0, y0 = points[-3]
        bend = (slope - (y1 - y0) / (x1 - x0)) / (x2 - x0)
    # At a distance d from x2: y2 + there d + bend d^2.
    there = slope + bend * (x2 - x1)
    if bend * x2 < 1e-3 * slope:
        return x2 + (target - y2) / slope
    root = there * there + 4 * bend * (target - y2)
    return x2 + (max(root, 0.0) ** 0.5 - there) / (2 * bend)


def _floor(value: float, granule: int) -> int:
    return int(value) // granule * granule
