from itertools import pairwise
from random import Random

import pytest

from ring_sp import layout, masks

LENGTHS = [1, 2, 3, 5, 7, 8, 9, 16, 17, 31, 64, 97]
SIZES = [1, 2, 3, 4, 8]
CASES = [(n, size) for n in LENGTHS for size in SIZES if n >= size]


@pytest.mark.parametrize("name", layout.LAYOUTS)
@pytest.mark.parametrize(("seq_len", "size"), CASES)
def test_each_position_is_held_exactly_once_in_ascending_order(
    name: str, seq_len: int, size: int
) -> None:
    shards = layout.shards(seq_len, size, name)
    held = [[p for span in shard for p in span] for shard in shards]
    assert len(held) == size
    assert sorted(p for own in held for p in own) == list(range(seq_len))
    assert all(own == sorted(own) for own in held)


@pytest.mark.parametrize("name", layout.LAYOUTS)
@pytest.mark.parametrize(("seq_len", "size"), CASES)
def test_lengths_differ_by_at_most_one_token_and_none_is_empty(
    name: str, seq_len: int, size: int
) -> None:
    lens = [layout.shard_len(shard) for shard in layout.shards(seq_len, size, name)]
    assert max(lens) - min(lens) <= 1
    assert min(lens) >= 1


def test_zigzag_is_megatrons_where_twice_the_ranks_divide() -> None:
    assert layout.zigzag(16, 4) == (
        (range(2), range(14, 16)),
        (range(2, 4), range(12, 14)),
        (range(4, 6), range(10, 12)),
        (range(6, 8), range(8, 10)),
    )


@pytest.mark.parametrize("size", [1, 2, 4])
def test_zigzag_documents_are_the_zigzag_shards_of_each_document_in_turn(size: int) -> None:
    lens = [8, 0, 24, 16]
    cuts = (0, 8, 8, 32, 48)
    shards = layout.shards(48, size, layout.ZigzagDocuments(cuts))
    for rank, shard in enumerate(shards):
        wanted = [
            start + p
            for start, length in zip(cuts, lens, strict=False)
            for span in layout.zigzag(length, size)[rank]
            for p in span
        ]
        assert [p for span in shard for p in span] == wanted


@pytest.mark.parametrize(
    ("cuts", "seq_len", "message"),
    [
        ((0, 4, 10), 10, "multiple of 4 tokens; got 6 at 4"),
        ((0, 8, 4, 12), 12, "multiple of 4 tokens; got -4 at 8"),
        ((0, 8), 12, "from 0 to the sequence's 12 tokens"),
        ((4, 12), 12, "from 0 to"),
        ((), 12, "from 0 to"),
    ],
)
def test_documents_that_do_not_fit_are_refused(
    cuts: tuple[int, ...], seq_len: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        layout.shards(seq_len, 2, layout.ZigzagDocuments(cuts))


def share(mask: masks.Mask, shards: tuple[layout.Shard, ...]) -> float:
    """Mean work of a rank by the most work of one."""
    whole = (range(sum(map(layout.shard_len, shards))),)
    works = [sum(tile.area for tile in masks.tiles(mask, shard, whole)) for shard in shards]
    return sum(works) / len(works) / max(works)


def positions(shards: tuple[layout.Shard, ...]) -> list[list[int]]:
    return [[p for span in shard for p in span] for shard in shards]


def work(mask: masks.Mask, seq_len: int) -> layout.Work:
    regions = mask.regions(seq_len)
    return lambda span: sum(x.area for x in regions.tiles((span,), (range(seq_len),)))


@pytest.mark.parametrize(("seq_len", "size"), CASES)
def test_balanced_holds_each_position_once_whatever_the_work(seq_len: int, size: int) -> None:
    random = Random(seq_len * size)
    shards = layout.balanced(seq_len, size, lambda span: random.randint(0, 9) ** 4 * len(span))
    assert sorted(p for shard in shards for span in shard for p in span) == list(range(seq_len))
    for shard in shards:
        starts = [span.start for span in shard]
        assert starts == sorted(starts) and all(shard)
        assert all(a.stop < b.start for a, b in pairwise(shard))
    lens = [layout.shard_len(shard) for shard in shards]
    assert max(lens) - min(lens) <= 1


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_balanced_is_zigzag_for_causal_and_contiguous_for_full(size: int) -> None:
    for seq_len in (48, 480):
        found = layout.balanced(seq_len, size, work(masks.causal(), seq_len))
        assert positions(found) == positions(layout.zigzag(seq_len, size))
        full = layout.balanced(seq_len, size, work(masks.full(), seq_len))
        assert full == layout.contiguous(seq_len, size)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_balanced_spreads_packed_documents(size: int) -> None:
    random = Random(size)
    for _ in range(20):
        cuts = [0]
        while cuts[-1] < 16384:
            cuts.append(min(cuts[-1] + int(random.lognormvariate(7, 1)) + 1, 16384))
        mask = masks.documents(cuts)
        shards = layout.balanced(16384, size, work(mask, 16384))
        assert share(mask, shards) > max(0.96, share(mask, layout.zigzag(16384, size)) - 0.02)


@pytest.mark.parametrize("name", layout.LAYOUTS)
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_split_pieces_join_to_the_shard(name: str, parts: int) -> None:
    for shard in layout.shards(37, 4, name):
        pieces = layout.split(shard, parts)
        assert [p for piece in pieces for span in piece for p in span] == [
            p for span in shard for p in span
        ]
        lens = [layout.shard_len(piece) for piece in pieces]
        assert max(lens) - min(lens) <= 1


@pytest.mark.parametrize(
    ("seq_len", "size", "name", "message"),
    [
        (8, 4, "spiral", "contiguous, striped, zigzag, balanced; got 'spiral'"),
        (3, 4, "zigzag", "at least 4 tokens; got 3"),
        (3, 0, "striped", "at least 1; got 0"),
    ],
)
def test_bad_input_says_what_is_needed(seq_len: int, size: int, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout.shards(seq_len, size, name)
