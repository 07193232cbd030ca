import time
from collections import Counter
from itertools import accumulate, pairwise
from random import Random

import pytest
from visibility import cases

from ring_sp import layout, masks
from ring_sp.kernels.bands import Band, band_of, coalesce, waves, without_stairs
from ring_sp.regions import Tile

Pairs = Counter[tuple[int, int]]


def pairs(tile: Tile) -> Pairs:
    """By the definition of a tile."""
    return Counter(
        (i, j)
        for i in range(tile.q_start, tile.q_stop)
        for j in range(tile.k_start, tile.k_stop)
        if tile.lo <= (i - tile.q_start) - (j - tile.k_start) <= tile.hi
    )


def seen(band: Band, tile: Tile) -> Pairs:
    """By the definition of a band, in a tile's rectangle."""
    ahead = (tile.k_stop - tile.k_start) - (tile.q_stop - tile.q_start)
    found = Pairs()
    for i in range(tile.q_stop - tile.q_start):
        for j in range(tile.k_stop - tile.k_start):
            before = i + ahead - j
            if (band.left is None or before <= band.left) and (
                band.right is None or -before <= band.right
            ):
                found[tile.q_start + i, tile.k_start + j] += 1
    return found


def total(counts: list[Pairs]) -> Pairs:
    return sum(counts, Pairs())


def steps() -> list[tuple[Tile, ...]]:
    """The tiles of every pair of shards, for all masks and layouts."""
    return [
        tuple(mask.regions(seq_len).tiles(queries, keys))
        for seq_len, size in [(1, 1), (7, 3), (24, 2), (29, 4)]
        for mask, _ in cases(seq_len).values()
        for name in layout.LAYOUTS
        for queries in layout.shards(seq_len, size, name)
        for keys in layout.shards(seq_len, size, name)
    ]


def test_each_pair_stays_in_exactly_one_tile_of_one_wave() -> None:
    for tiles in steps():
        true = total([pairs(tile) for tile in tiles])
        fewer = coalesce(tiles)
        assert total([pairs(tile) for tile in fewer]) == true and len(fewer) <= len(tiles)
        assert all(pairs(tile) == seen(band_of(tile), tile) for tile in fewer)
        groups = waves(fewer)
        assert total([seen(band, tile) for band, group in groups for tile in group]) == true
        for _, group in groups:
            for one, two in pairwise(group):
                assert one.q_stop <= two.q_start and one.k_stop <= two.k_start


def test_rows_and_columns_of_fewer_tiles_all_see_something_and_no_limit_is_below_zero() -> None:
    for tiles in steps():
        for tile in coalesce(tiles):
            own = pairs(tile)
            assert {i for i, _ in own} == set(range(tile.q_start, tile.q_stop))
            assert {j for _, j in own} == set(range(tile.k_start, tile.k_stop))
            assert all(limit is None or limit >= 0 for limit in band_of(tile))


def test_without_stairs_only_full_tiles_and_causal_squares_are_left() -> None:
    for tiles in steps():
        for tile in tiles:
            if band_of(tile).left is not None:
                with pytest.raises(ValueError, match="left of a diagonal"):
                    without_stairs(tile)
                continue
            pieces = without_stairs(tile)
            assert total([pairs(piece) for piece in pieces]) == pairs(tile)
            for piece in pieces:
                rows, cols = piece.q_stop - piece.q_start, piece.k_stop - piece.k_start
                assert piece.full or (rows == cols and band_of(piece) == (None, 0))


@pytest.mark.parametrize("name", layout.LAYOUTS)
def test_a_shard_that_meets_itself_is_one_causal_tile(name: str) -> None:
    for shard in layout.shards(64, 4, name):
        (tile,) = coalesce(masks.causal().regions(64).tiles(shard, shard))
        assert band_of(tile) == (None, 0)


def test_a_mask_without_windows_needs_none_after_coalescing() -> None:
    random = Random(0)
    for _ in range(50):
        cuts = [0, *accumulate(random.choice([1, 1, 2, 5]) for _ in range(10))]
        regions = masks.documents(cuts).regions(cuts[-1])
        for queries in layout.shards(cuts[-1], 2, "zigzag"):
            for keys in layout.shards(cuts[-1], 2, "zigzag"):
                fewer = coalesce(regions.tiles(queries, keys))
                assert all(band_of(tile).left is None for tile in fewer)


def test_zigzag_shards_meet_in_one_tile() -> None:
    shards = layout.shards(64, 4, "zigzag")
    regions = masks.causal().regions(64)
    for queries in shards:
        for keys in shards:
            (tile,) = coalesce(regions.tiles(queries, keys))
            assert queries == keys or tile.full


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("name", layout.LAYOUTS)
def test_packed_documents_are_few_waves_and_ten_thousand_take_under_a_second(
    window: int | None, name: str
) -> None:
    random = Random(0)
    cuts = [0, *accumulate(random.choice([1, 2, 30, 50, 200]) for _ in range(10_000))]
    rule = masks.documents(cuts, None if window is None else masks.sliding_window(window))
    regions = rule.regions(cuts[-1])
    own, other = layout.shards(cuts[-1], 4, name)[:2]
    for keys in (own, other):
        tiles = tuple(regions.tiles(own, keys))
        start = time.perf_counter()
        found = waves(coalesce(tiles))
        assert time.perf_counter() - start < 1
        assert sum(len(group) for _, group in found) <= len(tiles)
        # A striped document that starts and ends in the middle of a stripe has a diagonal there.
        assert len(found) <= (3 if keys is own else 8)
