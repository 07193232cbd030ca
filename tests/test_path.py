"""What is told of a rank's messages and visits, against those of ring_pass."""

from collections.abc import Callable
from functools import partial
from itertools import product
from math import prod

import pytest
from conftest import World
from test_ring import NESTED, SINGLE, Shape, Table, numel, passes, sums_numel, tables

from ring_sp.loads import paths
from ring_sp.ring import Axis, Path, visiting_order


def needed(table: Table, rank: int, source: int) -> bool:
    return table[rank][source]


@pytest.mark.parametrize("shape", SINGLE + NESTED, ids=str)
def test_a_path_knows_each_message_and_visit_of_its_rank_without_processes(
    world: Callable[[int], World], shape: Shape
) -> None:
    asked, places = tables(prod(shape)), product(*map(range, shape))
    by_rank = world(prod(shape)).run(passes, shape, list(asked.values()), True)
    shared = {
        name: [[*path.sent()] for path in paths(shape, partial(needed, table))]
        for name, table in asked.items()
    }
    for rank, (place, found) in enumerate(zip(places, by_rank, strict=True)):
        rings = tuple(map(Axis, place, shape))
        for (name, table), mine in zip(asked.items(), found, strict=True):
            path = Path(rings, partial(needed, table))
            told = [(tag, (numel, sums_numel)[tag](source)) for tag, source in path.sent()]
            sent = [(tag, length) for kind, _, tag, length in mine.notes if kind == "isend"]
            assert told == sent, name
            assert shared[name][rank] == [*path.sent()], name
            needs = [source for source in visiting_order(rings) if needed(table, rank, source)]
            assert mine.seen == needs, name
