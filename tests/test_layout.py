import pytest

from ring_sp import layout

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
        (8, 4, "spiral", "contiguous, striped, zigzag; got 'spiral'"),
        (3, 4, "zigzag", "at least 4 tokens; got 3"),
        (3, 0, "striped", "at least 1; got 0"),
    ],
)
def test_bad_input_says_what_is_needed(seq_len: int, size: int, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout.shards(seq_len, size, name)
