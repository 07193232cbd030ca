"""gather_pass: who sends what to whom when; and what a plan has to see together."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import World
from foretold import places, station
from ranks import groups
from ringed import Case
from torch import Tensor
from visibility import cases

from ring_sp import ShardedSequence, layout, masks
from ring_sp.gather import Gathering, gather_pass
from ring_sp.kernels.bands import coalesce
from ring_sp.layout import shard_len
from ring_sp.ring import DATA, SUMS, Axis, Message
from ring_sp.topology import Topology

WORLDS = [(1, 1), (2, 1), (3, 1), (3, 2), (4, 1), (4, 2), (4, 3)]
"""Ranks, and sources that are gathered at a time."""


@dataclass(frozen=True)
class Seen:
    """What one rank did in a pass."""

    visits: list[tuple[int, list[float]]]
    total: list[float] | None
    batches: list[list[tuple[str, int, int, int]]]
    """In order, and of each message the operation, the other rank, the tag and its elements."""
    ahead: list[int]
    """Batches that had started at the time of each visit."""


Table = list[list[range]]
"""[rank][source]: the tokens of a source that a rank sees."""


def tables(size: int) -> list[Table]:
    shards = layout.contiguous(5 * size + 2, size)

    def table(seen: Callable[[int, int], range]) -> Table:
        return [[seen(rank, source) for source in range(size)] for rank in range(size)]

    def length(source: int) -> int:
        return shard_len(shards[source])

    return [
        table(lambda _, source: range(length(source))),
        table(lambda *_: range(0)),
        table(lambda rank, source: range(length(source) * (rank == source))),
        table(lambda rank, _: range(1, 3) if rank != size // 2 else range(0)),
        table(lambda _, source: range(2, 5) if source != size // 2 else range(0)),
        table(lambda rank, source: range(rank % 4, length(source) if rank > source else 0)),
    ]


Pair = tuple[int, int, int]
"""Who sends to whom with which tag."""

WIDTHS = (2, 3)
"""Elements of a token in the two blocks of a tensor."""


def blocks(tensor: Tensor) -> list[Tensor]:
    tokens = tensor.numel() // (2 * sum(WIDTHS))
    parts = tensor.split([2 * tokens * width for width in WIDTHS])
    return [x.view(2, tokens, width) for x, width in zip(parts, WIDTHS, strict=True)]


def content(source: int, tokens: int) -> Tensor:
    """A number for each element, unlike all others."""
    return 1e4 * source + torch.arange(10.0 * tokens, dtype=torch.float64)


def one_pass(size: int, gather: int, number: int) -> Seen:
    rank, group = dist.get_rank(), groups(ring=size).group("ring")
    shards, table = layout.contiguous(5 * size + 2, size), tables(size)[number]
    axis = Axis(rank, size, group)
    gathering = Gathering(axis, gather, shards, lambda reader, source: table[reader][source])
    visits: list[tuple[int, list[float]]] = []
    ahead: list[int] = []

    def visit(tensor: Tensor, name: int) -> Tensor:
        visits.append((name, tensor.tolist()))
        ahead.append(len(calls.call_args_list))
        return tensor * (rank + 2)

    message = Message(
        lambda source: 10 * shard_len(shards[source]),
        torch.float64,
        torch.device("cpu"),
        torch.float64,
        blocks=blocks,
    )
    with mock.patch.object(dist, "batch_isend_irecv", wraps=dist.batch_isend_irecv) as calls:
        total = gather_pass(content(rank, shard_len(shards[rank])), gathering, visit, message)
    batches = [
        [(op.op.__name__, op.peer, op.tag, op.tensor.numel()) for op in call.args[0]]
        for call in calls.call_args_list
    ]
    return Seen(visits, None if total is None else total.tolist(), batches, ahead)


PASSES = [(size, gather) for size, gather in WORLDS if size > 1] + [(8, 3), (8, 7)]
each_pass = pytest.mark.parametrize(("size", "gather"), PASSES)
_found: dict[tuple[int, int], list[list[Seen]]] = {}


def passed(world: Callable[[int], World], size: int, gather: int) -> list[tuple[Table, list[Seen]]]:
    """Each table, and what the ranks did with it."""
    if (size, gather) not in _found:
        numbers = range(len(tables(size)))
        _found[size, gather] = [world(size).run(one_pass, size, gather, n) for n in numbers]
    return list(zip(tables(size), _found[size, gather], strict=True))


@each_pass
def test_each_rank_sees_the_tokens_it_needs_and_gets_the_sums_of_its_own(
    world: Callable[[int], World], size: int, gather: int
) -> None:
    lens = [shard_len(shard) for shard in layout.contiguous(5 * size + 2, size)]
    for table, ranks in passed(world, size, gather):
        for rank, mine in enumerate(ranks):
            own = [name for name, _ in mine.visits if name == rank]
            assert own == [rank] * bool(table[rank][rank])
            assert not own or mine.visits[0] == (rank, content(rank, lens[rank]).tolist())
            others = [tensor for name, tensor in mine.visits if name != rank]
            seen = sorted(x for tensor in others for x in tensor)
            wanted = [
                block[:, tokens.start : tokens.stop]
                for source, tokens in enumerate(table[rank])
                if source != rank
                for block in blocks(content(source, lens[source]))
            ]
            assert seen == sorted(x for block in wanted for x in block.flatten().tolist())
            distances = [range(at, min(at + gather, size)) for at in range(1, size, gather)]
            needed = [any(table[rank][(rank - d) % size] for d in step) for step in distances]
            assert len(others) == sum(needed)

            sums = torch.zeros_like(content(rank, lens[rank]))
            for reader in range(size):
                tokens = table[reader][rank]
                for part, x in zip(blocks(sums), blocks(content(rank, lens[rank])), strict=True):
                    at = slice(tokens.start, tokens.stop if reader != rank else tokens.start)
                    part[:, at] += x[:, at] * (reader + 2)
            alone = not any(table[reader][rank] for reader in range(size) if reader != rank)
            assert (mine.total is None) == alone
            assert alone or torch.equal(torch.tensor(mine.total, dtype=torch.float64), sums)


@each_pass
def test_messages_are_those_of_the_tokens_and_in_one_order_at_both_ends(
    world: Callable[[int], World], size: int, gather: int
) -> None:
    for table, ranks in passed(world, size, gather):
        sent: dict[Pair, list[int]] = defaultdict(list)
        received: dict[Pair, list[int]] = defaultdict(list)
        for rank, mine in enumerate(ranks):
            for batch in mine.batches:
                assert len({tag for _, _, tag, _ in batch}) == 1
                for kind, peer, tag, elements in batch:
                    pair = (rank, peer, tag) if kind == "isend" else (peer, rank, tag)
                    (sent if kind == "isend" else received)[pair].append(elements)
        assert sent == received
        messages: dict[Pair, list[int]] = {}
        for rank, source in product(range(size), repeat=2):
            tokens = table[rank][source]
            if rank != source and tokens:
                lengths = [width * len(tokens) for width in WIDTHS for _ in range(2)]
                messages[source, rank, DATA] = messages[rank, source, SUMS] = lengths
        assert sent == messages


@each_pass
def test_what_comes_next_and_the_sums_of_what_was_are_under_way_during_each_visit(
    world: Callable[[int], World], size: int, gather: int
) -> None:
    """Where all see all: the first step starts before the own visit, and each later one, and the
    sums of the visit before, before the visit that hides them.
    """
    _, ranks = passed(world, size, gather)[0]
    steps = -(-(size - 1) // gather)
    for mine in ranks:
        tags = [batch[0][2] for batch in mine.batches]
        fetched = [at for at, tag in enumerate(tags) if tag == DATA]
        home = [at for at, tag in enumerate(tags) if tag == SUMS]
        assert (len(fetched), len(home)) == (steps, steps)
        for step, ahead in enumerate(mine.ahead):
            assert sum(at < ahead for at in fetched) == min(step + 1, steps)
            assert sum(at < ahead for at in home) == max(step - 1, 0)


@pytest.mark.parametrize(("size", "gather"), [(4, 3), (8, 2), (8, 3), (8, 7), (5, 2)])
@pytest.mark.parametrize("seq_len", [320, 331])
def test_a_causal_zigzag_visit_is_at_most_two_full_tiles(
    size: int, gather: int, seq_len: int
) -> None:
    for rank in range(size):
        topology = Topology(ring=Axis(rank, size), gather=gather)
        plan = ShardedSequence(seq_len, topology).plan()
        assert len(plan.own_visits) == 1 + -(-(size - 1) // gather)
        own, *others = plan.own_visits
        assert own == rank
        for number in others:
            tiles = coalesce(plan.tiles(number))
            assert len(tiles) <= 2 and all(tile.full for tile in tiles)
            assert tiles[-1].k_stop == shard_len(plan.own_visits[number][1])


def test_a_window_over_several_sources_is_one_band() -> None:
    for rank, gather in ((5, 2), (5, 4), (7, 7)):
        topology = Topology(ring=Axis(rank, 8), gather=gather)
        plan = ShardedSequence(80, topology, masks.sliding_window(35), "contiguous").plan()
        for number in [*plan.own_visits][1:]:
            (tile,) = plan.tiles(number)
            assert (tile.q_start, tile.k_start) == (0, 0)


@pytest.mark.parametrize("name", ["contiguous", "zigzag"])
def test_of_a_window_only_what_it_reaches_travels(name: str) -> None:
    seq = ShardedSequence(80, Topology(ring=Axis(1, 4), gather=3), masks.sliding_window(3), name)
    gathering = seq.plan().gathering
    assert gathering is not None
    for rank in range(4):
        tokens = sum(len(gathering.seen(rank, source)) for source in range(4) if source != rank)
        # Three before each span that does not start the sequence or follow a span of its own.
        starts = [span.start for span in layout.joined(seq.ring_shards[rank])]
        assert tokens == 3 * sum(start > 0 for start in starts)


@pytest.mark.parametrize("gather", [1, 2, 3])
@pytest.mark.parametrize("name", layout.LAYOUTS)
def test_what_is_sent_is_the_shortest_stretch_of_what_somebody_sees(name: str, gather: int) -> None:
    for mask in cases(29):
        case = Case(mask, name, 29)
        queries, keys = places(case, station({"ring": 4, "gather": gather}, 0))
        gathering = queries.plan(keys).gathering
        assert gathering is not None
        sees = cases(29)[mask][1]
        for rank, source in product(range(4), repeat=2):
            rows = [p for span in queries.ring_shards[rank] for p in span]
            columns = [p for span in keys.ring_shards[source] for p in span]
            hit = [n for n, key in enumerate(columns) if any(sees(q, key) for q in rows)]
            wanted = range(hit[0], hit[-1] + 1) if hit else range(0)
            assert list(gathering.seen(rank, source)) == list(wanted)


def sum_of_small_parts() -> list[float]:
    """What comes home in bf16 to a rank from three others: 256, 1 and 1."""
    axis = Axis(dist.get_rank(), 4, groups(ring=4).group("ring"))
    shards = layout.contiguous(8, 4)
    gathering = Gathering(axis, 2, shards, lambda *_: range(2))

    def visit(tensor: Tensor, _: int) -> Tensor:
        return torch.full_like(tensor, 256.0 if axis.rank == 0 else 1.0)

    bf16, cpu = torch.bfloat16, torch.device("cpu")
    message = Message(lambda _: 20, bf16, cpu, bf16, blocks=blocks)
    total = gather_pass(torch.zeros(20, dtype=bf16), gathering, visit, message)
    assert total is not None
    return total.tolist()


def test_parts_are_summed_in_float32_whatever_they_travel_in(
    world: Callable[[int], World],
) -> None:
    mine, *others = world(4).run(sum_of_small_parts)
    assert set(mine) == {3.0} and all(set(other) == {258.0} for other in others)
