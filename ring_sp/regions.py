"""Regions of an attention mask, and the tiles in which two shards meet in them. No torch here.

A region meets a pair of spans as one band, so a kernel sees rectangles with two diagonals and never
the name of a mask or of a layout.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from ring_sp.layout import Shard

UNBOUNDED = 1 << 62


class Region(NamedTuple):
    """Query p sees key k where both lie in the rectangle and p - left <= k <= p + right
    (tokens).
    """

    q_start: int = 0
    q_stop: int = UNBOUNDED
    k_start: int = 0
    k_stop: int = UNBOUNDED
    left: int = UNBOUNDED
    right: int = UNBOUNDED

    @property
    def empty(self) -> bool:
        if self.q_start >= self.q_stop or self.k_start >= self.k_stop:
            return True
        nearest, farthest = self.k_start - (self.q_stop - 1), self.k_stop - 1 - self.q_start
        return max(-self.left, nearest) > min(self.right, farthest)


class Tile(NamedTuple):
    """A rectangle of local slots in which query slot q_start + i sees key slot k_start + j where lo
    <= i - j <= hi.

    Slots count a shard's tokens in storage order. lo and hi are clipped to the rectangle, and every
    row and every column of a tile has at least one visible pair.
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    lo: int
    hi: int

    @property
    def full(self) -> bool:
        """Whether every pair is visible."""
        return (
            self.lo == 1 - (self.k_stop - self.k_start)
            and self.hi == self.q_stop - self.q_start - 1
        )

    @property
    def area(self) -> int:
        """Number of visible pairs: the unit of work for balance, pruning and planning."""
        rows, cols = self.q_stop - self.q_start, self.k_stop - self.k_start
        above = _triangle(rows - 1 - self.hi, cols)
        below = _triangle(cols - 1 + self.lo, rows)
        return rows * cols - above - below


class Regions:
    """Disjoint regions, ready to be met with many pairs of shards."""

    def __init__(self, regions: Iterable[Region]) -> None:
        self._chains = _chains(regions)

    def __iter__(self) -> Iterator[Region]:
        for chain in self._chains:
            yield from chain.regions

    def tiles(self, q_shard: Shard, kv_shard: Shard) -> Iterator[Tile]:
        """What the queries of one shard see of the keys of another; each visible pair in exactly
        one tile.

        Raises ValueError where a banded mask meets spans of different steps.
        """
        q_slot, (k_slots, firsts, lasts, ascending) = 0, _columns(kv_shard)
        for q_span in q_shard:
            regions = _rows(self._chains, q_span.start, q_span[-1] + 1)
            met = range(len(kv_shard))
            if ascending and regions:
                left = min(region.k_start for region in regions)
                right = max(region.k_stop for region in regions)
                met = range(bisect_left(lasts, left), bisect_left(firsts, right))
            for number in met:
                first, last = firsts[number], lasts[number]
                for region in regions:
                    if region.k_start <= last and region.k_stop > first:
                        k_span, k_slot = kv_shard[number], k_slots[number]
                        tile = _meet(region, q_span, k_span, q_slot, k_slot)
                        if tile is not None:
                            yield tile
            q_slot += len(q_span)


@lru_cache(maxsize=1024)
def _columns(shard: Shard) -> tuple[list[int], list[int], list[int], bool]:
    """First slots, first and last positions of a shard's spans; whether they ascend."""
    firsts, lasts = [span.start for span in shard], [span[-1] for span in shard]
    ascending = all(last < first for last, first in zip(lasts, firsts[1:], strict=False))
    return [*accumulate(map(len, shard), initial=0)], firsts, lasts, ascending


def _triangle(side: int, limit: int) -> int:
    """Pairs in the corner of `side` rows that lose side, side - 1, ... pairs, each at most
    `limit`.
    """
    if side <= 0:
        return 0
    beyond = max(side - limit, 0)
    return side * (side + 1) // 2 - beyond * (beyond + 1) // 2


def _meet(region: Region, q_span: range, k_span: range, q_slot: int, k_slot: int) -> Tile | None:
    q_start, q_stop, k_start, k_stop, left, right = region
    top, bottom = _slots(q_span, q_start, q_stop)
    first, last = _slots(k_span, k_start, k_stop)
    rows, cols = bottom - top, last - first
    if rows <= 0 or cols <= 0:
        return None
    lo, hi = 1 - cols, rows - 1
    p, k = q_span.start + top * q_span.step, k_span.start + first * k_span.step
    if k + (cols - 1) * k_span.step > p + right or k < p + hi * q_span.step - left:
        step = q_span.step if q_span.step == k_span.step else _common_step(q_span, k_span)
        lo, hi = max(lo, -((p + right - k) // step)), min(hi, (k - p + left) // step)
        if lo > hi:
            return None
        above, before = max(lo, 0), max(-hi, 0)
        rows, cols = min(rows, cols + hi), min(cols, rows - lo)
        rows, cols, lo, hi = rows - above, cols - before, lo + before - above, hi + before - above
        lo, hi = max(lo, 1 - cols), min(hi, rows - 1)
        top, first = top + above, first + before
    q_slot, k_slot = q_slot + top, k_slot + first
    return Tile(q_slot, q_slot + rows, k_slot, k_slot + cols, lo, hi)


def _slots(span: range, start: int, stop: int) -> tuple[int, int]:
    """First and last + 1 index of the positions of a span inside start .. stop - 1."""
    base, step = span.start, span.step
    first = -((base - start) // step) if start > base else 0
    last = -((base - stop) // step)
    return first, min(last, len(span))


def _common_step(q_span: range, k_span: range) -> int:
    steps = {span.step for span in (q_span, k_span) if len(span) > 1} or {1}
    if len(steps) > 1:
        raise ValueError(
            f"a banded mask needs queries and keys of one step; got steps {q_span.step} "
            f"and {k_span.step}. Give both sequences the same layout."
        )
    return steps.pop()


def union(base: list[Region], extra: list[Region]) -> list[Region]:
    """`base` and what `extra` adds to it, disjoint."""
    chains, added = _chains(base), []
    for region in extra:
        pieces = [region]
        for other in _rows(chains, region.q_start, region.q_stop):
            pieces = [rest for piece in pieces for rest in _minus(piece, other)]
        added.extend(pieces)
    return base + added


def _minus(region: Region, other: Region) -> list[Region]:
    """The pairs of `region` that are not in `other`."""
    q_start, q_stop = max(region.q_start, other.q_start), min(region.q_stop, other.q_stop)
    k_start, k_stop = max(region.k_start, other.k_start), min(region.k_stop, other.k_stop)
    if q_start >= q_stop or k_start >= k_stop:
        return [region]
    beside = region._replace(q_start=q_start, q_stop=q_stop)
    within = beside._replace(k_start=k_start, k_stop=k_stop)
    pieces = [
        region._replace(q_stop=q_start),
        region._replace(q_start=q_stop),
        beside._replace(k_stop=k_start),
        beside._replace(k_start=k_stop),
        within._replace(right=min(region.right, -other.left - 1)),
        within._replace(left=min(region.left, -other.right - 1)),
    ]
    return [piece for piece in pieces if not piece.empty]


class _Chain:
    """Regions whose rows ascend without overlap, so that those of a stretch of rows are found by
    bisection.
    """

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self.stops: list[int] = []


def _chains(regions: Iterable[Region]) -> list[_Chain]:
    chains: list[_Chain] = []
    for region in sorted(regions, key=lambda region: region.q_start):
        chain = next((c for c in chains if c.stops[-1] <= region.q_start), None)
        if chain is None:
            chains.append(chain := _Chain())
        chain.regions.append(region)
        chain.stops.append(region.q_stop)
    return chains


def _rows(chains: list[_Chain], start: int, stop: int) -> list[Region]:
    """The regions that have rows in start .. stop - 1."""
    found = []
    for chain in chains:
        first = bisect_right(chain.stops, start)
        last = bisect_left(chain.regions, (stop,), lo=first)
        found.extend(chain.regions[first:last])
    return found
