"""What one station of a ring does in a pass: the tiles of each visit, and the way of its tensor."""

from collections import defaultdict
from collections.abc import Hashable, Iterator
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from ring_sp.gather import Gathering, gather_pass
from ring_sp.layout import Shard, shard_len
from ring_sp.regions import Regions, Tile
from ring_sp.ring import Axis, Message, Path, Visit, ring_pass, visiting_order


def positions(shard: Shard, device: torch.device | str | None) -> Tensor:
    """Global positions of the tokens of a shard, int64."""
    return torch.cat(
        [torch.arange(span.start, span.stop, span.step, device=device) for span in shard]
    )


class Plan:
    """The tiles in which the queries of each station of a ring meet the keys of each other.

    The keys go round and each rank visits those that its queries see, one source at a time, or
    `gather` sources at a time, which make a visit together; in a `turned` plan the queries go
    round, and each rank visits those that see its keys. A visit has a number: that of its source,
    or of one of its sources.
    """

    def __init__(
        self,
        q_shards: tuple[Shard, ...],
        kv_shards: tuple[Shard, ...],
        regions: Regions,
        rings: tuple[Axis, ...],
        gather: int | None = None,
        turned: bool = False,
    ) -> None:
        self._facts, self._turned = (q_shards, kv_shards, regions, rings, gather), turned
        self.regions = regions
        self._order = visiting_order(rings)
        self.rank = self._order[0]
        """This station's number: what is its own is the first that it visits."""
        self.stations = len(kv_shards)
        self.q_lens = tuple(map(shard_len, q_shards))
        """Queries of each station, in tokens."""
        self.kv_lens = tuple(map(shard_len, kv_shards))

        def meet(rank: int, source: int) -> Iterator[Tile]:
            """Where what is a rank's own and what comes from a source see each other."""
            queries, keys = (source, rank) if turned else (rank, source)
            return regions.tiles(q_shards[queries], kv_shards[keys])

        @cache
        def needs(rank: int, source: int) -> bool:
            """Whether what is a rank's own and what comes from a source see each other."""
            return next(meet(rank, source), None) is not None

        def seen(rank: int, source: int) -> range:
            tiles = list(meet(rank, source))
            first = min((tile.k_start for tile in tiles), default=0)
            return range(first, max((tile.k_stop for tile in tiles), default=0))

        self.needs = needs
        self.path = Path(rings, needs)
        """The way round the rings of what goes round to those who need it."""
        self.gathering: Gathering | None = None
        """Who gets what of whom, where several sources make a visit."""
        if gather is not None and rings and not turned:
            self.gathering = Gathering(rings[0], gather, kv_shards, seen)
        self.num_regions = sum(1 for _ in regions)
        """Regions of the mask."""
        q_len = sum(self.q_lens)
        self.windowed = any(
            region.left < min(region.q_stop, q_len) - 1 - region.k_start for region in regions
        )
        """Whether the mask hides keys on the left of a diagonal."""
        self._tiles: dict[int, tuple[Tile, ...]] = {}
        self.derived: defaultdict[int, dict[Hashable, Any]] = defaultdict(dict)
        """What kernels keep with the tiles of each visit; see `kernels.contract.Step`."""

    def show(self, x: Tensor, visit: Visit, message: Message) -> Tensor | None:
        """Show this rank's `x` to every rank that needs it, and visit what this rank needs; see
        `ring_pass` and `gather_pass`.
        """
        if self.gathering is not None:
            return gather_pass(x, self.gathering, visit, message)
        return ring_pass(x, self.path, visit, message)

    def visits(self, rank: int) -> dict[int, tuple[Shard, Shard]]:
        """The queries and the keys of each visit of a rank, by its number."""
        q_shards, kv_shards, *_ = self._facts
        if self.gathering is not None:
            keys = self.gathering.visits(rank)
            return {number: (q_shards[rank], shard) for number, shard in keys.items()}
        sources = (source for source in self._order if self.needs(rank, source))
        if self._turned:
            return {source: (q_shards[source], kv_shards[rank]) for source in sources}
        return {source: (q_shards[rank], kv_shards[source]) for source in sources}

    @cached_property
    def own_visits(self) -> dict[int, tuple[Shard, Shard]]:
        """Those of this rank, in order."""
        return self.visits(self.rank)

    @cached_property
    def final(self) -> int | None:
        """The last visit of this rank; None if it sees nothing."""
        return next(reversed(self.own_visits), None)

    def tiles(self, number: int) -> tuple[Tile, ...]:
        """Where the queries and the keys of a visit of this rank see each other; none if it does
        not make that visit.
        """
        if number not in self._tiles:
            visit = self.own_visits.get(number, ((), ()))
            self._tiles[number] = tuple(self.regions.tiles(*visit))
        return self._tiles[number]

    def positions(self, number: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Global positions of the queries and of the keys of a visit, int32."""
        key = "positions", device
        if key not in self.derived[number]:
            found = (positions(shard, device).int() for shard in self.own_visits[number])
            self.derived[number][key] = tuple(found)
        q, k = self.derived[number][key]
        return q, k

    @cached_property
    def turned(self) -> "Plan":
        """The plan in which the queries go round."""
        return Plan(*self._facts, turned=True)
