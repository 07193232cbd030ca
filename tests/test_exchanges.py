"""Exchanges by name: gathered attention is exact, ranks agree, and what cannot be is refused."""

import re
from collections.abc import Callable
from itertools import product
from typing import Any, cast
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import World
from foretold import foretold, station
from ranks import groups, raised, sequence
from ringed import Case, assert_exact, inputs, relative, repeats
from visibility import cases

from ring_sp import ProcessGroupManager, ShardedSequence, layout, ring_attention, topology
from ring_sp.exchanges import gathered
from ring_sp.gather import default_sources
from ring_sp.logits import max_logits
from ring_sp.ring import SUMS, Axis
from ring_sp.topology import Topology

WORLDS = [(1, 1), (2, 1), (3, 1), (3, 2), (4, 1), (4, 2), (4, 3)]
"""Ranks, and sources that are gathered at a time."""
LENGTHS = (29, 24, 37, 31)
HEADS = ((4, 2), (4, 4), (4, 1))


@pytest.mark.parametrize(("size", "gather"), WORLDS)
@pytest.mark.parametrize("name", layout.LAYOUTS)
def test_equals_unsharded_attention(
    world: Callable[[int], World], size: int, gather: int, name: str
) -> None:
    every = [
        Case(mask, name, LENGTHS[n % 4], heads=HEADS[n % 3], v_head_dim=(5, 8)[n % 2])
        for n, mask in enumerate(cases(24))
    ]
    every += [Case("window", name, 29, 43), Case("causal", name, 41, 17, sinks=True, softcap=2.0)]
    every += [Case("documents", name, 41, dropout_p=0.3), Case("window", name, 64)]
    assert_exact(world(size), {"ring": size, "gather": gather}, every)


@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        (4, {"ring": 2, "ulysses": 2, "gather": 1}),
        (4, {"tensor": 2, "ring": 2, "gather": 1}),
        (3, {"outer": 3, "gather": 2}),
        (6, {"ring": 3, "ulysses": 2, "gather": 2}),
        (8, {"ring": 8, "gather": 3}),
    ],
    ids=str,
)
def test_beside_other_axes_it_equals_unsharded_attention(
    world: Callable[[int], World], size: int, sizes: dict[str, int]
) -> None:
    every = [
        Case(mask, name, 37, heads=(4, 2), dropout_p=0.2 * (mask == "causal"))
        for mask, name in product(("full", "causal", "window", "documents"), layout.LAYOUTS)
    ]
    assert_exact(world(size), sizes, every)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_low_precision_is_near(
    world: Callable[[int], World], dtype: torch.dtype, bound: float
) -> None:
    low = [Case(mask, dtype=dtype, seq_len=96) for mask in ("causal", "documents", "window")]
    assert_exact(world(4), {"ring": 4, "gather": 2}, low, bound)


def test_two_runs_give_the_same_bits(world: Callable[[int], World]) -> None:
    case = Case(seq_len=29, dtype=torch.float32)
    for gather in (1, 2, 3):
        assert all(world(4).run(repeats, {"ring": 4, "gather": gather}, case))


def largest(sizes: dict[str, int]) -> float:
    """How far max_logits of this rank is from those of the whole scores."""
    worst = 0.0
    for case in (Case(), Case("window", "contiguous", 31), Case("full", "striped", 24)):
        (q, k, *_), _ = inputs(case, 0)
        mask, sees = cases(case.seq_len)[case.mask]
        seq = sequence(sizes, case.seq_len, mask=mask, layout=case.layout)
        visible = torch.tensor(
            [[sees(a, b) for b in range(case.seq_len)] for a in range(case.seq_len)]
        )
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, 2)) * 8**-0.5
        wanted = scores.masked_fill(~visible, -torch.inf).amax(3)
        found = max_logits(seq.shard(q), seq.shard(k), seq)
        worst = max(worst, relative(found, seq.shard(wanted, 2).amax((0, 2))))
    return worst


def test_largest_scores_are_those_of_the_whole(world: Callable[[int], World]) -> None:
    for gather in (1, 2, 3):
        assert max(world(4).run(largest, {"ring": 4, "gather": gather})) < 1e-14


def disagreeing(number: int) -> list[str]:
    """What a rank is told whose peers gather by 1 where rank 0 gathers by `number`."""
    exchange = f"gather:{1 if dist.get_rank() else number}" if number else "messages"
    if dist.get_rank() and not number:
        exchange = "gather"
    topology = ProcessGroupManager.build(ring=3, exchange=exchange).topology
    x, seq = torch.zeros(1, 4, 2, 8), ShardedSequence(12, topology)
    return [
        raised(ring_attention, x, x, x, seq),
        raised(max_logits, x, x, seq),
        raised(seq.unshard, x),
    ]


@pytest.mark.parametrize(("number", "named"), [(2, "gather:2"), (0, "messages")])
def test_ranks_that_gather_otherwise_are_refused_everywhere(
    world: Callable[[int], World], number: int, named: str
) -> None:
    for messages in world(3).run(disagreeing, number):
        for message in messages:
            assert re.search(f"must make the same call.*{named}.*gather", message, re.DOTALL)


def refusals() -> list[str]:
    group = groups(ring=4).group("ring")
    assert group is not None
    build, from_group = ProcessGroupManager.build, ProcessGroupManager.from_group
    spoken = AssertionError("refused after a rank has spoken")
    with (
        mock.patch.object(topology, "init_device_mesh", side_effect=spoken),
        mock.patch.object(dist, "all_gather_object", side_effect=spoken),
    ):
        nested = [
            raised(build, ring=2, outer=2, exchange="gather"),
            raised(from_group, group, outer=2, exchange="gather:1"),
        ]
    return [
        *nested,
        raised(build, ring=4, exchange="gather:0"),
        raised(build, ring=4, exchange="gather:-1"),
        raised(build, ring=4, exchange="gather:N"),
        raised(build, ring=4, exchange="messages:2"),
        raised(build, ring=4, exchange=None),
    ]


def test_what_cannot_be_gathered_is_refused_by_name(world: Callable[[int], World]) -> None:
    for messages in cast("list[list[str]]", world(4).run(refusals)):
        nested, unknown = messages[:2], messages[2:]
        assert all("'gather' is for one ring; got outer 2 x ring 2" in each for each in nested)
        assert all("messages, copies, gather, gather:N; got" in each for each in unknown)
    with pytest.raises(NotImplementedError, match="outer 2 x ring 3"):
        Topology(Axis(0, 2), Axis(0, 3), gather=1)


def test_a_number_of_sources_is_at_most_all_and_by_default_the_root() -> None:
    assert [default_sources(size) for size in (2, 3, 4, 5, 6, 8, 10, 11, 16, 17, 18, 64)] == [
        *(1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 8)
    ]
    assert [gathered(x, 8) for x in ("gather", "gather:2", "gather:99")] == [3, 2, 7]
    assert gathered("gather:2", 1) is gathered("messages", 8) is gathered("copies", 8) is None


def sums_sent(asked: torch.dtype | None, kv_heads: int) -> tuple[set[torch.dtype], float]:
    """The dtypes in which this rank sends gradients, and how far dk is from float64's."""
    group = groups(ring=3).group("sequence")
    assert group is not None
    options: dict[str, Any] = {"exchange": "gather:2", "sums_dtype": asked}
    topology = ProcessGroupManager.from_group(group, **options).topology
    make, found = torch.Generator().manual_seed(3), []
    whole = [torch.randn(1, 96, h, 16, generator=make) for h in (4, kv_heads, kv_heads, 4)]
    for place, kind in (ShardedSequence(96, topology), torch.bfloat16), (ShardedSequence(96), None):
        q, k, v, dout = (place.shard(x.bfloat16().to(kind or torch.float64)) for x in whole)
        trained = [x.requires_grad_() for x in (q, k, v)]
        out = ring_attention(q, k, v, place)
        with mock.patch.object(dist, "batch_isend_irecv", wraps=dist.batch_isend_irecv) as batches:
            found.append(torch.autograd.grad(out, trained, dout)[1])
        if kind:
            ops = [op for call in batches.call_args_list for op in call.args[0]]
    sums = {op.tensor.dtype for op in ops if op.op is dist.isend and op.tag == SUMS}
    mine, true = found[0].double(), ShardedSequence(96, topology).shard(found[1])
    return sums, ((mine - true).norm() / true.norm()).item()


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("asked", [None, torch.float32, torch.bfloat16], ids=str)
def test_gradients_travel_in_the_dtype_asked_for_and_are_rounded_once(
    world: Callable[[int], World], asked: torch.dtype | None, kv_heads: int
) -> None:
    for dtypes, error in world(3).run(sums_sent, asked, kv_heads):
        assert dtypes == {asked or torch.bfloat16}
        assert error < 4e-3


def test_queries_are_not_gathered_and_visits_are_fewer_and_explain_says_so() -> None:
    many = Case(heads=(4, 4))
    ring = foretold(many, False, station({"ring": 4}, 0))
    told = foretold(many, False, station({"ring": 4, "gather": 2}, 0))
    assert (ring.backward_travels, told.backward_travels) == ("queries", "keys")
    assert "gather:2 (outer 1, ring 4, ulysses 1); keys travel in backward, as queries" in str(told)
    assert [load.visits for load in ring.loads] == [4] * 4
    assert [load.visits for load in told.loads] == [3] * 4
