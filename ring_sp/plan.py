"""What one station of a ring does in a pass: the tiles of each visit, and the way round."""

from collections import defaultdict
from collections.abc import Hashable, Iterator
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from ring_sp.layout import Shard, shard_len
from ring_sp.regions import Regions, Tile
from ring_sp.ring import Axis, Path, visiting_order


def positions(shard: Shard, device: torch.device | str | None) -> Tensor:
    """Global positions of the tokens of a shard, int64."""
    return torch.cat(
        [torch.arange(span.start, span.stop, span.step, device=device) for span in shard]
    )


class Plan:
    """The tiles in which the queries of each station of a ring meet the keys of each other.

    The keys go round and each rank visits those that its queries see; in a `turned` plan the
    queries go round, and each rank visits those that see its keys.
    """

    def __init__(
        self,
        q_shards: tuple[Shard, ...],
        kv_shards: tuple[Shard, ...],
        regions: Regions,
        rings: tuple[Axis, ...],
        turned: bool = False,
    ) -> None:
        self._facts, self._turned = (q_shards, kv_shards, regions, rings), turned
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

        self.meet, self.needs = meet, needs
        self.path = Path(rings, needs)
        """The way of what goes round to those who need it."""
        self.num_regions = sum(1 for _ in regions)
        """Regions of the mask."""
        q_len = sum(self.q_lens)
        self.windowed = any(
            region.left < min(region.q_stop, q_len) - 1 - region.k_start for region in regions
        )
        """Whether the mask hides keys on the left of a diagonal."""
        self._tiles: dict[int, tuple[Tile, ...]] = {}
        self.derived: defaultdict[int, dict[Hashable, Any]] = defaultdict(dict)
        """What kernels keep with the tiles of each source; see `kernels.contract.Step`."""

    @cached_property
    def final(self) -> int | None:
        """The last source that this rank visits; None if it sees nothing."""
        return next((s for s in reversed(self._order) if self.needs(self.rank, s)), None)

    def tiles(self, source: int) -> tuple[Tile, ...]:
        """Where what is this rank's own and what comes from `source` see each other."""
        if source not in self._tiles:
            self._tiles[source] = tuple(self.meet(self.rank, source))
        return self._tiles[source]

    def positions(self, source: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Global positions of the queries and of the keys of a visit, int32."""
        key = "positions", device
        if key not in self.derived[source]:
            stations = (source, self.rank) if self._turned else (self.rank, source)
            shards = zip(self._facts[:2], stations, strict=True)
            found = [positions(each[station], device).int() for each, station in shards]
            self.derived[source][key] = tuple(found)
        q, k = self.derived[source][key]
        return q, k

    @cached_property
    def turned(self) -> "Plan":
        """The plan in which the queries go round."""
        return Plan(*self._facts, turned=True)
