"""ring_pass against tables of needs: who sees what, what comes home, and every message on the
way.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import prod
from random import Random
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import World
from ranks import groups
from torch import Tensor

from ring_sp import ShardedSequence, masks
from ring_sp.ring import Axis, Message, Path, ring_pass
from ring_sp.topology import Topology

Shape = tuple[int, ...]
Table = list[list[bool]]
"""[rank][source]: whether a rank needs a source."""
Note = tuple[str, int, int, int]
"""(isend or irecv, the other global rank, tag, elements)."""

SINGLE: list[Shape] = [(1,), (2,), (3,), (4,), (8,)]
NESTED: list[Shape] = [(2, 2), (2, 4), (4, 2), (2, 2, 2)]
TOKENS = 4
"""Tokens of a station in the tables that come from masks."""
DATA, SUMS = 0, 1


@dataclass(frozen=True)
class Pass:
    """What one rank saw, got and exchanged."""

    seen: list[int]
    intact: bool
    total: list[float] | None
    notes: list[Note]
    ahead: list[int]
    """Messages that it had started at the time of each visit."""


Passes = dict[str, list[Pass]]
"""By name of the table: the pass of each rank."""


def tables(size: int) -> dict[str, Table]:
    random, stations = Random(size), range(size)

    def table(needs: Callable[[int, int], bool]) -> Table:
        return [[needs(rank, source) for source in stations] for rank in stations]

    def drawn(share: float) -> Table:
        return table(lambda *_: random.random() < share)

    def plan(mask: masks.Mask, layout: str) -> Table:
        topology = Topology(ring=Axis(0, size))
        return table(ShardedSequence(TOKENS * size, topology, mask, layout).plan().needs)

    return {
        "everything": table(lambda *_: True),
        "nothing": table(lambda *_: False),
        "own": table(lambda rank, source: rank == source),
        "next": table(lambda rank, source: rank == (source + 1) % size),
        "farthest": table(lambda rank, source: rank == (source - 1) % size),
        "idle rank": table(lambda rank, _: rank != size // 2),
        "unseen source": table(lambda _, source: source != size // 2),
        "causal contiguous": plan(masks.causal(), "contiguous"),
        "window contiguous": plan(masks.sliding_window(TOKENS + 1), "contiguous"),
        "causal zigzag": plan(masks.causal(), "zigzag"),
        "causal striped": plan(masks.causal(), "striped"),
        **{f"{share} {draw}": drawn(share) for share in (0.15, 0.4, 0.8) for draw in range(4)},
    }


def numel(source: int) -> int:
    """The length of a tensor tells whose it is."""
    return 3 + 2 * source


def sums_numel(source: int) -> int:
    """A sum need not be as long as what it is about."""
    return numel(source) + 1


def content(source: int) -> Tensor:
    return torch.randn(numel(source), generator=torch.Generator().manual_seed(source))


def part(rank: int, seen: Tensor) -> Tensor:
    """What a rank adds to the sum of a tensor."""
    return torch.cat([seen.double(), torch.ones(1)]) * (rank + 2) ** 0.5


def passes(shape: Shape, asked: list[Table], sums: bool) -> list[Pass]:
    """A pass for each table, on one rank of nested rings of these sizes."""
    names = ("data", "outer", "ring")[-len(shape) :]
    manager = groups(**dict(zip(names[-2:], shape[-2:], strict=True)))
    rings = tuple(
        Axis(manager.rank(name), manager.size(name), manager.group(name)) for name in names
    )
    assert tuple(axis.size for axis in rings) == shape
    return [one_pass(dist.get_rank(), rings, table, sums) for table in asked]


def one_pass(rank: int, rings: tuple[Axis, ...], table: Table, sums: bool) -> Pass:
    seen: list[int] = []
    ahead: list[int] = []
    intact = True

    def visit(tensor: Tensor, source: int) -> Tensor | None:
        nonlocal intact
        seen.append(source)
        ahead.append(len(notes()))
        intact = intact and torch.equal(tensor, content(source))
        return part(rank, tensor) if sums else None

    def notes() -> list[Note]:
        ops = (op for call in batches.call_args_list for op in call.args[0])
        return [(op.op.__name__, op.peer, op.tag, op.tensor.numel()) for op in ops]

    def needs(reader: int, source: int) -> bool:
        return table[reader][source]

    sums_dtype = torch.float64 if sums else None
    message = Message(numel, torch.float32, torch.device("cpu"), sums_dtype, sums_numel)
    with mock.patch.object(dist, "batch_isend_irecv", wraps=dist.batch_isend_irecv) as batches:
        total = ring_pass(content(rank), Path(rings, needs), visit, message)
    assert total is None or total.dtype == torch.float64
    return Pass(seen, intact, None if total is None else total.tolist(), notes(), ahead)


@pytest.fixture(scope="module")
def passed(world: Callable[[int], World]) -> Callable[[Shape, bool], Passes]:
    """passed(shape, sums): every table once round nested rings of these sizes."""

    @cache
    def of(shape: Shape, sums: bool) -> Passes:
        size = prod(shape)
        asked = tables(size)
        by_rank = world(size).run(passes, shape, list(asked.values()), sums)
        return dict(zip(asked, map(list, zip(*by_rank, strict=True)), strict=True))

    return of


@pytest.mark.parametrize("sums", [True, False], ids=["sums", "no sums"])
@pytest.mark.parametrize("shape", SINGLE + NESTED, ids=str)
def test_each_rank_sees_every_source_that_it_needs_once_and_its_own_first(
    passed: Callable[[Shape, bool], Passes], shape: Shape, sums: bool
) -> None:
    for name, table in tables(prod(shape)).items():
        for rank, mine in enumerate(passed(shape, sums)[name]):
            needed = [source for source, need in enumerate(table[rank]) if need]
            assert sorted(mine.seen) == needed, name
            assert rank not in needed or mine.seen[0] == rank, name
            assert mine.intact, name


@pytest.mark.parametrize("shape", SINGLE, ids=str)
def test_the_total_is_the_sum_over_the_visits_of_others_in_ring_order(
    passed: Callable[[Shape, bool], Passes], shape: Shape
) -> None:
    (size,) = shape
    for name, table in tables(size).items():
        for source, mine in enumerate(passed(shape, True)[name]):
            readers = [(source + hop) % size for hop in range(1, size)]
            parts = [part(rank, content(source)) for rank in readers if table[rank][source]]
            assert mine.total == (sum(parts[1:], parts[0]).tolist() if parts else None), name


@pytest.mark.parametrize("shape", NESTED, ids=str)
def test_nested_rings_see_and_return_what_a_single_ring_does(
    passed: Callable[[Shape, bool], Passes], shape: Shape
) -> None:
    single = passed((prod(shape),), True)
    for name, nested in passed(shape, True).items():
        for one, other in zip(single[name], nested, strict=True):
            assert set(one.seen) == set(other.seen), name
            assert (one.total is None) == (other.total is None), name
            if one.total is not None:
                assert other.total == pytest.approx(one.total, rel=1e-14, abs=0), name


@pytest.mark.parametrize("shape", SINGLE + NESTED, ids=str)
def test_without_sums_nothing_but_the_tensors_travels(
    passed: Callable[[Shape, bool], Passes], shape: Shape
) -> None:
    for name, ranks in passed(shape, False).items():
        assert all(mine.total is None for mine in ranks)
        for mine, with_sums in zip(ranks, passed(shape, True)[name], strict=True):
            assert mine.notes == [note for note in with_sums.notes if note[2] == DATA]


@pytest.mark.parametrize("shape", SINGLE + NESTED, ids=str)
def test_every_message_is_sent_and_received_in_one_order(
    passed: Callable[[Shape, bool], Passes], shape: Shape
) -> None:
    for name, ranks in passed(shape, True).items():
        sent, received = defaultdict(list), defaultdict(list)
        for rank, mine in enumerate(ranks):
            for kind, peer, tag, elements in mine.notes:
                if kind == "isend":
                    sent[rank, peer, tag].append(elements)
                else:
                    received[peer, rank, tag].append(elements)
        assert sent == received, name


Places = set[tuple[int, ...]]


def journey(places: Places, shape: Shape, start: tuple[int, ...], tag: int) -> Counter[int]:
    """Messages that bring the tensor of station `start` to all places (DATA), or the sum over all
    places home to it (SUMS).
    """
    if not shape or not places:
        return Counter()
    size = shape[0]
    inner = [
        {place[1:] for place in places if place[0] == (start[0] + hop) % size}
        for hop in range(size)
    ]
    stops = [hop for hop in range(size) if inner[hop]]
    first, last = stops[0], stops[-1]
    below = (journey(rest, shape[1:], start[1:], tag) for rest in inner)
    return sum(below, Counter({tag: last if tag == DATA else last - first + (last > 0)}))


def messages(ranks: list[Pass]) -> Counter[tuple[int, int]]:
    """How many messages of each tag and length all ranks sent."""
    return Counter(
        (tag, elements)
        for mine in ranks
        for kind, _, tag, elements in mine.notes
        if kind == "isend"
    )


@pytest.mark.parametrize("shape", SINGLE + NESTED, ids=str)
def test_no_tensor_goes_beyond_its_last_reader_and_no_sum_starts_before_its_first(
    passed: Callable[[Shape, bool], Passes], shape: Shape
) -> None:
    stations = list(product(*map(range, shape)))
    for name, table in tables(prod(shape)).items():
        wanted: Counter[tuple[int, int]] = Counter()
        for source, start in enumerate(stations):
            readers = {place for rank, place in enumerate(stations) if table[rank][source]}
            for tag, places, length in (
                (DATA, readers, numel(source)),
                (SUMS, readers - {start}, sums_numel(source)),
            ):
                wanted[tag, length] = journey(places, shape, start, tag)[tag]
        assert messages(passed(shape, True)[name]) == +wanted, name


@pytest.mark.parametrize("shape", SINGLE, ids=str)
def test_hops_of_contiguous_shards_end_with_the_mask_and_those_of_zigzag_go_all_round(
    passed: Callable[[Shape, bool], Passes], shape: Shape
) -> None:
    (size,) = shape
    hops = {
        "everything": [size - 1] * size,
        "causal zigzag": [size - 1] * size,
        "causal striped": [size - 1] * size,
        "causal contiguous": [size - 1 - source for source in range(size)],
        "window contiguous": [min(2, size - 1 - source) for source in range(size)],
        "own": [0] * size,
        "next": [min(1, size - 1)] * size,
        "farthest": [size - 1] * size,
        "nothing": [0] * size,
    }
    for name, wanted in hops.items():
        sent = messages(passed(shape, True)[name])
        assert [sent[DATA, numel(source)] for source in range(size)] == wanted, name


@pytest.mark.parametrize("shape", SINGLE, ids=str)
def test_the_next_tensor_is_on_its_way_during_each_visit(
    passed: Callable[[Shape, bool], Passes], shape: Shape
) -> None:
    (size,) = shape
    for mine in passed(shape, False)["everything"]:
        assert mine.ahead == [2 * min(hop + 1, size - 1) for hop in range(size)]


@pytest.mark.parametrize("rings", [(), (Axis(),), (Axis(), Axis())], ids=len)
@pytest.mark.parametrize("needed", [True, False])
def test_one_rank_sees_its_own_tensor_without_a_message(
    rings: tuple[Axis, ...], needed: bool
) -> None:
    mine = one_pass(0, rings, [[needed]], sums=True)
    assert mine == (Pass([0], True, None, [], [0]) if needed else Pass([], True, None, [], []))
