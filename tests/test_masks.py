import pickle
import time
from itertools import accumulate, pairwise
from random import Random
from typing import Any

import pytest
from visibility import Sees, cases

from ring_sp import layout, masks
from ring_sp.masks import Mask, Tile

NAMES = list(cases(24))

untyped: Any = masks


def pairs(tile: Tile) -> list[tuple[int, int]]:
    return [
        (i, j)
        for i in range(tile.q_start, tile.q_stop)
        for j in range(tile.k_start, tile.k_stop)
        if tile.lo <= (i - tile.q_start) - (j - tile.k_start) <= tile.hi
    ]


def check(
    mask: Mask, sees: Sees, seq_len: int, size: int, name: str | layout.ZigzagDocuments
) -> None:
    shards = layout.shards(seq_len, size, name)
    positions = [[p for span in shard for p in span] for shard in shards]
    regions = mask.regions(seq_len)
    for queries, q_shard in zip(positions, shards, strict=True):
        for keys, kv_shard in zip(positions, shards, strict=True):
            found = list(regions.tiles(q_shard, kv_shard))
            covered = [pair for tile in found for pair in pairs(tile)]
            visible = [
                (i, j) for i, q in enumerate(queries) for j, k in enumerate(keys) if sees(q, k)
            ]
            assert sorted(covered) == visible
            for tile in found:
                own = pairs(tile)
                assert tile.area == len(own)
                assert {i for i, _ in own} == set(range(tile.q_start, tile.q_stop)), "an empty row"
                assert {j for _, j in own} == set(range(tile.k_start, tile.k_stop)), (
                    "an empty column"
                )
                assert tile.full == (
                    tile.area == (tile.q_stop - tile.q_start) * (tile.k_stop - tile.k_start)
                )


@pytest.mark.parametrize("layout_name", layout.LAYOUTS)
@pytest.mark.parametrize("mask_name", NAMES)
def test_tiles_cover_each_visible_pair_exactly_once(mask_name: str, layout_name: str) -> None:
    for seq_len, size in [(1, 1), (7, 3), (16, 2), (24, 4), (29, 4), (8, 8), (19, 8)]:
        mask, sees = cases(seq_len)[mask_name]
        check(mask, sees, seq_len, size, layout_name)


def test_tiles_cover_random_documents_and_spans() -> None:
    random = Random(0)
    for _ in range(20):
        seq_len = random.randint(4, 40)
        cuts = [0, *sorted(random.choices(range(seq_len + 1), k=random.randint(1, 9)))]
        edges = sorted(random.choices(range(seq_len + 1), k=4))
        spans = [(edges[0], edges[1]), (edges[2], edges[3])]
        left, right = random.randint(0, 6), random.randint(0, 3)

        def sees(
            q: int,
            k: int,
            cuts: list[int] = cuts,
            spans: list[tuple[int, int]] = spans,
            left: int = left,
            right: int = right,
        ) -> bool:
            packed = any(a <= q < b and a <= k < b for a, b in pairwise(cuts))
            return (packed and q - left <= k <= q + right) or any(
                a <= q < b and a <= k < b for a, b in spans
            )

        mask = masks.bidirectional_spans(
            spans, masks.documents(cuts, masks.sliding_window(left, right))
        )
        check(mask, sees, seq_len, random.randint(1, 4), random.choice(list(layout.LAYOUTS)))


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_zigzag_gives_every_pair_of_distinct_ranks_the_same_causal_area(size: int) -> None:
    shards, regions = layout.zigzag(6 * size, size), masks.causal().regions(6 * size)
    areas = {
        (q, s): sum(tile.area for tile in regions.tiles(shards[q], shards[s]))
        for q in range(size)
        for s in range(size)
    }
    assert len({area for (q, s), area in areas.items() if q != s}) == 1
    assert len({area for (q, s), area in areas.items() if q == s}) == 1


@pytest.mark.parametrize("layout_name", layout.LAYOUTS)
def test_ten_thousand_documents_over_eight_ranks_take_less_than_a_second(layout_name: str) -> None:
    random = Random(0)
    cuts = [0, *accumulate(random.randint(1, 4000) for _ in range(10_000))]
    start = time.process_time()
    regions, shards = (
        masks.documents(cuts).regions(cuts[-1]),
        layout.shards(cuts[-1], 8, layout_name),
    )
    found = [tile for source in shards for tile in regions.tiles(shards[3], source)]
    assert time.process_time() - start < 1.0
    assert len(found) >= 1_000


def test_two_thousand_documents_each_in_zigzag_take_less_than_a_second() -> None:
    random = Random(0)
    cuts = (0, *accumulate(16 * random.randint(1, 250) for _ in range(2_000)))
    start = time.process_time()
    regions = masks.documents(cuts).regions(cuts[-1])
    shards = layout.shards(cuts[-1], 8, layout.ZigzagDocuments(cuts))
    found = [len(list(regions.tiles(shards[3], source))) for source in shards]
    assert time.process_time() - start < 1.0
    assert min(found) >= 4_000


@pytest.mark.parametrize("size", [1, 2, 3])
def test_tiles_cover_padded_documents_each_in_zigzag(size: int) -> None:
    cuts, lens = [0, 12, 12, 36, 48], [7, 0, 24, 1]

    def sees(q: int, k: int) -> bool:
        return k <= q and any(a <= k <= q < a + n for a, n in zip(cuts, lens, strict=False))

    mask, shards = masks.documents(cuts, lens=lens), layout.ZigzagDocuments(tuple(cuts))
    check(mask, sees, 48, size, shards)
    check(pickle.loads(pickle.dumps(mask)), sees, 50, size, "striped")
    assert mask != masks.documents(cuts)


def test_a_window_leaves_of_a_mask_what_both_let_see() -> None:
    rules: list[tuple[Mask, Sees]] = [
        (masks.causal(), lambda q, k: k <= q),
        (masks.full(), lambda _q, _k: True),
        (masks.documents([0, 9, 10, 21], lens=[7, 1, 11]), cases_of_documents),
    ]
    for left, right in ((3, 0), (0, 0), (5, 2), (None, 0)):
        for mask, sees in rules:
            check(masks.windowed(mask, left, right), near(sees, left, right), 24, 4, "zigzag")
    with pytest.raises(NotImplementedError, match=r"cannot narrow the mask prefix_lm\(2\)"):
        masks.windowed(masks.prefix_lm(2), 3)


def near(sees: Sees, left: int | None, right: int) -> Sees:
    return lambda q, k: sees(q, k) and (left is None or q - k <= left) and k - q <= right


def cases_of_documents(q: int, k: int) -> bool:
    """What packed causal documents with padding let see."""
    return k <= q and any(
        q in held and k in held for held in (range(7), range(9, 10), range(10, 21))
    )


def test_spans_may_come_from_an_iterator() -> None:
    listed = masks.bidirectional_spans([(2, 5), (8, 9)])
    assert masks.bidirectional_spans(zip([2, 8], [5, 9], strict=True)) == listed


def test_masks_are_equal_by_name_and_arguments_and_survive_pickling() -> None:
    for mask, _ in cases(30).values():
        again = pickle.loads(pickle.dumps(mask))
        assert again == mask
        assert hash(again) == hash(mask)
        assert list(again.regions(30).tiles((range(30),), (range(30),))) == masks.tiles(
            mask, (range(30),), (range(30),)
        )
    long = list(range(200))
    assert masks.documents(long, masks.documents(long)) != masks.documents(
        long, masks.documents(long[:-1])
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: masks.sliding_window(-1), r"got \(-1, 0\)"),
        (lambda: masks.chunked(0), "got 0"),
        (lambda: untyped.chunked(2.5), "whole number; got 2.5"),
        (lambda: untyped.sliding_window(2.5), "whole number; got 2.5"),
        (lambda: untyped.documents([0, 2.5]), "whole number; got 2.5"),
        (lambda: untyped.documents(5), "must be a sequence; got 5"),
        (lambda: untyped.documents([0, 5], "causal"), "inner must be a mask.*'causal'"),
        (lambda: untyped.bidirectional_spans([(1, 2, 3)]), r"must be \(start, stop\)"),
        (lambda: untyped.bidirectional_spans([2, 5]), "must be a sequence; got 2"),
        (lambda: masks.prefix_lm(-2), "got -2"),
        (lambda: masks.documents([1, 4]), r"got \(1, 4\)"),
        (lambda: masks.documents([0, 4, 3]), "never fall"),
        (lambda: masks.documents([0, 4, 8], lens=[5, 1]), r"lens \(5, 1\)"),
        (lambda: masks.documents([0, 4, 8], lens=[4]), "one length for each of 2 places"),
        (lambda: masks.bidirectional_spans([(0, 4), (3, 6)]), "without overlap"),
        (lambda: masks.documents([0, 9]).regions(8), "speaks of 9 positions, the sequence has 8"),
        (lambda: masks.tiles(masks.causal(), (range(0, 8, 2),), (range(8),)), "the same layout"),
    ],
)
def test_bad_input_says_what_is_needed(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()
