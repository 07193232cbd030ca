from collections.abc import Callable, Iterator
from itertools import combinations
from math import prod
from random import Random
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import World
from ranks import groups, raised

from ring_sp import ProcessGroupManager
from ring_sp.ring import Axis
from ring_sp.topology import AXES, SEQUENCE, Topology, grid_groups, grid_shape

Place = tuple[int, int, list[int]]
"""This rank's number in a group, its size, its global ranks."""

SHAPES = [(1,), (8,), (2, 3), (2, 1, 4), (3, 2, 2), (1, 2, 3, 1, 2, 2), (2, 2, 2, 2, 2, 2)]
JOINED = {name: (name,) for name in AXES} | {
    "sequence": SEQUENCE,
    "data_sequence": ("data", *SEQUENCE),
}


def dims_of(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Every choice of dimensions."""
    for count in range(len(shape) + 1):
        yield from combinations(range(len(shape)), count)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_groups_of_a_kind_partition_the_world_in_rank_order(shape: tuple[int, ...]) -> None:
    for dims in dims_of(shape):
        found = grid_groups(shape, dims)
        assert sorted(rank for group in found for rank in group) == list(range(prod(shape)))
        assert all(group == sorted(group) for group in found)
        assert {len(group) for group in found} == {prod(shape[dim] for dim in dims)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_groups_of_complementary_axes_meet_in_exactly_one_rank(shape: tuple[int, ...]) -> None:
    for dims in dims_of(shape):
        others = [dim for dim in range(len(shape)) if dim not in dims]
        for group in grid_groups(shape, dims):
            for other in grid_groups(shape, others):
                assert len({*group} & {*other}) == 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_coordinates_and_ranks_are_a_bijection_with_the_last_axis_fastest(
    shape: tuple[int, ...],
) -> None:
    coordinates = [
        {rank: group.index(rank) for group in grid_groups(shape, [dim]) for rank in group}
        for dim in range(len(shape))
    ]
    for rank in range(prod(shape)):
        again = 0
        for size, own in zip(shape, coordinates, strict=True):
            again = again * size + own[rank]
        assert again == rank


def test_data_is_what_the_other_axes_leave() -> None:
    shape = grid_shape(48, {"pipeline": 2, "outer": 1, "ring": 3, "ulysses": 2, "tensor": 2})
    assert dict(zip(AXES, shape, strict=True)) == {
        "pipeline": 2,
        "data": 2,
        "outer": 1,
        "ring": 3,
        "ulysses": 2,
        "tensor": 2,
    }


def test_groups_are_those_of_megatron() -> None:
    state = pytest.importorskip("megatron.core.parallel_state")
    random, token_of = Random(0), {"tensor": "tp", "data": "dp", "pipeline": "pp"}
    for _ in range(20):
        sizes = {name: random.choice([1, 2, 3]) for name in AXES}
        shape = tuple(sizes.values())
        theirs = state.RankGenerator(
            tp=sizes["tensor"],
            ep=1,
            dp=sizes["data"],
            pp=sizes["pipeline"],
            cp=prod(sizes[name] for name in SEQUENCE),
            order="tp-cp-ep-dp-pp",
        )
        for names in (("tensor",), ("data",), ("pipeline",), SEQUENCE, ("data", *SEQUENCE)):
            token = "-".join(dict.fromkeys(token_of.get(name, "cp") for name in names))
            ours = grid_groups(shape, [AXES.index(name) for name in names])
            assert sorted(theirs.get_ranks(token)) == sorted(ours), (sizes, token)


def place(axis: Axis) -> Place:
    ranks = [dist.get_rank()] if axis.group is None else dist.get_process_group_ranks(axis.group)
    assert ranks[axis.rank] == dist.get_rank()
    return axis.rank, axis.size, ranks


def places(manager: ProcessGroupManager) -> dict[str, Place]:
    return {
        name: place(Axis(manager.rank(name), manager.size(name), manager.group(name)))
        for name in JOINED
    }


def built(sizes: dict[str, int]) -> dict[str, Place]:
    return places(ProcessGroupManager.build(**sizes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "sizes",
    [
        {"ring": 8},
        {"tensor": 2, "ring": 2},
        {"pipeline": 2, "ring": 2, "ulysses": 2},
        {"outer": 2, "ring": 2, "ulysses": 2},
    ],
    ids=str,
)
def test_build_gives_the_groups_of_the_grid(
    world: Callable[[int], World], sizes: dict[str, int]
) -> None:
    shape = grid_shape(8, sizes)
    for rank, found in enumerate(world(8).run(built, sizes)):
        for name, joined in JOINED.items():
            all_groups = grid_groups(shape, [AXES.index(axis) for axis in joined])
            (own,) = (group for group in all_groups if rank in group)
            assert found[name] == (own.index(rank), len(own), own), name


def spread(topology: Topology) -> list[object]:
    """All that a topology says, groups by their ranks."""
    assert topology.group is not None
    return [
        *(place(axis) for axis in (topology.outer, topology.ring, topology.ulysses)),
        dist.get_process_group_ranks(topology.group),
        (topology.rank, topology.size, topology.ring_rank, topology.ring_size),
        [place(axis) for axis in topology.rings],
    ]


def subdivided_and_built() -> list[tuple[list[object], list[object]]]:
    """The context group of tensor 2 x ring 4 cut in several ways, and what build makes of those
    sizes.
    """
    host = groups(tensor=2, ring=4).group("sequence")
    assert host is not None
    cuts: list[dict[str, Any]] = [{"ulysses": 2}, {"outer": 2}, {"ulysses": 4}, {"outer": 4}, {}]
    pairs = []
    for cut in cuts:
        manager = ProcessGroupManager.from_group(host, **cut)
        ring = 4 // prod(cut.values())
        pairs.append((manager, groups(tensor=2, ring=ring, **cut)))
        assert [manager.size(name) for name in ("ring", "sequence")] == [ring, 4]
    return [(spread(ours.topology), spread(whole.topology)) for ours, whole in pairs]


def test_a_hosts_group_subdivided_is_what_build_would_make(world: Callable[[int], World]) -> None:
    for rank in world(8).run(subdivided_and_built):
        for ours, whole in rank:
            assert ours == whole


def halves() -> list[float]:
    """Two halves of the world subdivide in two ways, while some ranks are in one group more; sums
    of ranks over each group.
    """
    whole = groups(tensor=2, ring=4)
    host = whole.group("sequence")
    assert host is not None
    dist.new_group([0, 1, 2])
    first = whole.rank("tensor") == 0
    cut: dict[str, Any] = {"ulysses": 2} if first else {"outer": 2}
    manager = ProcessGroupManager.from_group(host, **cut)
    sums = []
    for name in ("ring", "ulysses" if first else "outer"):
        ranks = torch.tensor([float(dist.get_rank())])
        dist.all_reduce(ranks, group=manager.group(name))
        sums.append(ranks.item())
    return sums


def test_each_group_is_subdivided_in_its_own_way_whatever_groups_its_members_are_in(
    world: Callable[[int], World],
) -> None:
    assert world(8).run(halves, timeout=30) == [
        [0 + 4, 0 + 2],
        [1 + 3, 1 + 5],
        [2 + 6, 0 + 2],
        [1 + 3, 3 + 7],
        [0 + 4, 4 + 6],
        [5 + 7, 1 + 5],
        [2 + 6, 4 + 6],
        [5 + 7, 3 + 7],
    ]


def unbroken() -> bool:
    """Rank 0 asks alone for one ring, so any communication would wait forever."""
    host = groups(tensor=2, ring=4).group("sequence")
    assert host is not None
    with mock.patch.object(dist, "new_group", side_effect=AssertionError("a new group")):
        ulysses, outer = (
            ProcessGroupManager.from_group(host, ulysses=size, outer=4 // size).topology
            for size in (4, 1)
        )
        ring = ulysses if dist.get_rank() else ProcessGroupManager.from_group(host).topology
    return (
        ulysses.ulysses.group is outer.outer.group is host
        and (dist.get_rank() > 0 or ring.ring.group is host)
        and ring.group is ulysses.group is outer.group is host
        and [len(topology.rings) for topology in (ulysses, outer)] == [0, 1]
    )


def test_a_group_that_stays_whole_is_used_as_it_is(world: Callable[[int], World]) -> None:
    assert all(world(8).run(unbroken, timeout=30))


def refusals() -> tuple[list[str], float]:
    """The messages that rank 0 gets for bad sizes, alone, and a sum over the world afterwards."""
    messages: list[str] = []
    host = groups(tensor=2, ring=4).group("sequence")
    if dist.get_rank() == 0:
        build, subdivide = ProcessGroupManager.build, ProcessGroupManager.from_group
        messages = [
            raised(build, tensor=3),
            raised(build, ring=4, ulysses=4),
            raised(build, pipeline=16),
            raised(build, ring=0),
            raised(build, outer=-2),
            raised(subdivide, host, ulysses=3),
            raised(subdivide, host, ulysses=2, outer=4),
            raised(subdivide, host, outer=0),
            raised(subdivide, host, ulysses=-1),
            raised(groups(tensor=2, ring=4).group, "context"),
        ]
    one = torch.ones(1)
    dist.all_reduce(one)
    return messages, one.item()


def test_bad_sizes_are_refused_before_any_communication(world: Callable[[int], World]) -> None:
    (messages, _), *_ = answers = world(8).run(refusals, timeout=30)
    assert [total for _, total in answers] == [8.0] * 8
    parts = [
        ("tensor 3 ", "multiple of 3 ranks; the world has 8"),
        ("ring 4 x ulysses 4 ", "multiple of 16 ranks; the world has 8"),
        ("pipeline 16 ", "multiple of 16 ranks; the world has 8"),
        ("ring", "at least 1; got 0"),
        ("outer", "at least 1; got -2"),
        ("has 4 ranks", "outer 1 x ulysses 3 "),
        ("has 4 ranks", "outer 4 x ulysses 2 "),
        ("outer", "at least 1; got 0"),
        ("ulysses", "at least 1; got -1"),
        ("pipeline, data, outer, ring, ulysses, tensor, sequence", "'context'"),
    ]
    for message, wanted in zip(messages, parts, strict=True):
        assert all(each in message for each in wanted), message or "no error"


def test_a_plain_process_is_a_world_of_one_rank() -> None:
    assert not dist.is_initialized()
    manager = ProcessGroupManager.build()
    assert manager.topology == Topology()
    assert manager.topology.rings == () and manager.mesh is None
    for name in JOINED:
        assert (manager.group(name), manager.rank(name), manager.size(name)) == (None, 0, 1)
    with pytest.raises(ValueError, match=r"ring 2 .*multiple of 2 ranks; the world has 1"):
        ProcessGroupManager.build(ring=2)


def test_ranks_of_a_sequence_count_outer_slowest_and_ulysses_fastest() -> None:
    found = [
        (topology.rank, topology.ring_rank)
        for outer in range(2)
        for ring in range(3)
        for ulysses in range(4)
        for topology in [Topology(Axis(outer, 2), Axis(ring, 3), Axis(ulysses, 4))]
        if (topology.size, topology.ring_size) == (24, 6)
    ]
    assert found == [(rank, rank // 4) for rank in range(24)]


def test_a_tensor_goes_round_the_rings_of_more_than_one_rank_slowest_first() -> None:
    outer, ring = Axis(1, 2), Axis(2, 3)
    assert Topology(outer, ring).rings == (outer, ring)
    assert Topology(outer).rings == (outer,)
    assert Topology(ring=ring, ulysses=Axis(0, 2)).rings == (ring,)
