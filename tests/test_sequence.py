import weakref
from collections.abc import Callable
from itertools import product
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from conftest import World
from ranks import raised, sequence
from torch import Tensor
from visibility import cases

from ring_sp import ShardedSequence, layout, masks
from ring_sp.kernels.bands import band_of
from ring_sp.ring import Axis
from ring_sp.topology import Topology

Sizes = dict[str, int]

WORLDS: list[tuple[int, Sizes]] = [
    (1, {}),
    (2, {"ulysses": 2}),
    (3, {"ring": 3}),
    (4, {"ring": 4}),
    (4, {"ring": 2, "ulysses": 2}),
    (4, {"outer": 2, "ring": 2}),
    (8, {"outer": 2, "ring": 2, "ulysses": 2}),
    (8, {"tensor": 2, "ring": 2, "ulysses": 2}),
]

DRAWN = [
    (torch.int64, 1),
    (torch.bool, 0),
    (torch.float64, 2),
    (torch.bfloat16, -1),
    (torch.float32, -2),
]
"""dtypes and dimensions of the tensors that are sharded."""


def station(rank: int, size: int, peer: int = 0, peers: int = 1) -> Topology:
    """A topology without processes."""
    return Topology(ring=Axis(rank, size), ulysses=Axis(peer, peers))


def joined(shards: tuple[layout.Shard, ...]) -> list[int]:
    return [position for shard in shards for span in shard for position in span]


def made(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    make = torch.Generator().manual_seed(seed)
    drawn = torch.randn(*shape, generator=make, dtype=torch.float64)
    if dtype == torch.bool:
        return drawn > 0
    return (drawn * 100).to(dtype)


def round_trips(sizes: Sizes) -> tuple[list[str], list[list[int]]]:
    """What failed, and the positions of this rank in each sequence."""
    failed: list[str] = []
    held: list[list[int]] = []
    for seq_len, name in product((8, 24, 29), layout.LAYOUTS):
        seq = sequence(sizes, seq_len, layout=name)
        positions = seq.positions()
        held.append(positions.tolist())
        assert positions.dtype == torch.int64
        assert len(positions) == seq.local_len == seq.lens[seq.topology.rank]
        for dtype, dim in DRAWN:
            shape = [2, 3, 5]
            shape[dim] = seq_len
            x = made(*shape, seed=seq_len, dtype=dtype)
            strided = x.transpose(0, 2).contiguous().transpose(0, 2)
            part = seq.shard(x, dim)
            same = (
                torch.equal(part, x.index_select(dim, positions)),
                torch.equal(seq.unshard(part, dim), x),
                torch.equal(seq.unshard(seq.shard(strided, dim), dim), x),
                part.dtype == dtype and part.shape[dim] == seq.local_len,
            )
            if not all(same):
                failed.append(f"{seq}, {dtype}, dim {dim}: {same}")
    return failed, held


@pytest.mark.parametrize(("size", "sizes"), WORLDS, ids=str)
def test_shard_and_unshard_are_inverse_and_positions_are_those_of_the_tokens_held(
    world: Callable[[int], World], size: int, sizes: Sizes
) -> None:
    answers = world(size).run(round_trips, sizes)
    assert [failed for failed, _ in answers] == [[]] * size
    copies = sizes.get("tensor", 1)
    for held in zip(*(held for _, held in answers), strict=True):
        tokens = sorted(position for own in held for position in own)
        assert tokens == sorted([*range(len(tokens) // copies)] * copies)


def gradients(sizes: Sizes) -> list[str]:
    """What failed; every rank has cotangents of its own."""
    failed: list[str] = []
    for seq_len, name in product((8, 19), layout.LAYOUTS):
        seq = sequence(sizes, seq_len, layout=name)
        rank = seq.topology.rank
        x = made(2, seq_len, 3, seed=0).requires_grad_()
        cotangents = [made(2, length, 3, seed=1 + r) for r, length in enumerate(seq.lens)]
        whole = torch.empty(2, seq_len, 3, dtype=torch.float64)
        for cotangent, shard in zip(cotangents, seq.shards, strict=True):
            whole[:, joined((shard,))] = cotangent
        own = cotangents[rank].requires_grad_()
        (dx,) = torch.autograd.grad(seq.shard(x), x, own, create_graph=True)
        (again,) = torch.autograd.grad(dx, own, x.detach())

        part = seq.shard(x).detach().requires_grad_()
        mine = made(2, seq_len, 3, seed=50 + rank).requires_grad_()
        (dpart,) = torch.autograd.grad(seq.unshard(part), part, mine, create_graph=True)
        (back,) = torch.autograd.grad(dpart, mine, cotangents[rank].detach())

        (through,) = torch.autograd.grad(seq.unshard(seq.shard(x)), x, x.detach())
        laws = {
            "the gradient of the whole is whole": torch.equal(dx, whole),
            "and its gradient this rank's part": torch.equal(again, seq.shard(x)),
            "each rank takes its part": torch.equal(dpart, mine[:, seq.positions()]),
            "and its gradient is whole": torch.equal(back, whole),
            "there and back is the identity": torch.equal(through, x),
        }
        failed += [f"{law}: {seq}" for law, holds in laws.items() if not holds]
    return failed


@pytest.mark.parametrize(
    ("size", "sizes"),
    [(1, {}), (3, {"ring": 3}), (4, {"ring": 4}), (4, {"ring": 2, "ulysses": 2})],
    ids=str,
)
def test_the_gradient_of_the_whole_is_whole_and_that_of_a_part_a_part(
    world: Callable[[int], World], size: int, sizes: Sizes
) -> None:
    assert world(size).run(gradients, sizes) == [[]] * size


@pytest.mark.parametrize("name", layout.LAYOUTS)
@pytest.mark.parametrize("peers", [1, 2, 3, 4])
def test_the_shards_of_ulysses_peers_join_to_that_of_their_ring_station(
    name: str, peers: int
) -> None:
    for seq_len, size in product((12, 29, 37), (1, 2, 3)):
        seq = ShardedSequence(seq_len, station(0, size, 0, peers), layout=name)
        regions, whole = seq.mask.regions(seq_len), (range(seq_len),)
        work = Mock(side_effect=lambda x, r=regions, w=whole: sum(t.area for t in r.tiles((x,), w)))
        assert seq.ring_shards == layout.shards(seq_len, size, name, work)
        for rank in range(size):
            own = seq.shards[rank * peers : (rank + 1) * peers]
            assert joined(own) == joined((seq.ring_shards[rank],))
        assert seq.lens == tuple(len(joined((shard,))) for shard in seq.shards)
        for rank, peer in product(range(size), range(peers)):
            mine = ShardedSequence(seq_len, station(rank, size, peer, peers), layout=name)
            assert mine.shards == seq.shards
            assert mine.positions().tolist() == joined((seq.shards[rank * peers + peer],))


@pytest.mark.parametrize("name", layout.LAYOUTS)
@pytest.mark.parametrize("mask", cases(24))
def test_every_rank_agrees_on_who_needs_whom_and_that_is_who_has_tiles(
    mask: str, name: str
) -> None:
    for seq_len, kv_len, size in [(24, 24, 4), (29, 29, 3), (17, 31, 4), (31, 17, 2)]:
        rule, sees = cases(seq_len)[mask]
        seqs = [ShardedSequence(seq_len, station(r, size), rule, name) for r in range(size)]
        keys = (
            ShardedSequence(kv_len, station(0, size), layout=name) if kv_len != seq_len else seqs[0]
        )
        plans = [seq.plan(keys if kv_len != seq_len else None) for seq in seqs]
        for rank, source in product(range(size), repeat=2):
            queries = joined((seqs[0].ring_shards[rank],))
            wanted = any(
                sees(q, k) for q, k in product(queries, joined((keys.ring_shards[source],)))
            )
            assert {plan.needs(rank, source) for plan in plans} == {wanted}
            assert bool(plans[rank].tiles(source)) == wanted
            assert plans[rank].kv_lens[source] == keys.lens[source]


def test_plans_and_tiles_are_worked_out_once() -> None:
    seq, keys = ShardedSequence(12, station(1, 2)), ShardedSequence(16, station(1, 2))
    assert seq.plan() is seq.plan() is seq.plan(seq)
    assert seq.plan(keys) is seq.plan(keys) is not seq.plan()
    assert seq.plan().tiles(0) is seq.plan().tiles(0)


def test_a_plan_goes_when_its_keys_or_its_queries_go() -> None:
    seq, keys = ShardedSequence(12), ShardedSequence(16)
    plan, own = weakref.ref(seq.plan(keys)), weakref.ref(seq.plan())
    del keys
    assert plan() is None
    assert own() is not None
    del seq
    assert own() is None


def refusals() -> tuple[list[str], float]:
    """The messages that rank 0 gets, alone but for unshard, and a sum over the world after."""
    seq = sequence({"ring": 4}, 30, layout="contiguous")
    topology, x = seq.topology, torch.zeros(2, 30, 3)
    messages = [raised(seq.unshard, part) for part in (x, x[:, :7], x[0, 0, 0])]
    if dist.get_rank() == 0:
        messages += [
            raised(seq.shard, x[:, :29]),
            raised(seq.shard, x, 0),
            raised(seq.shard, x, 3),
            raised(seq.shard, x.requires_grad_(), -4),
            raised(ShardedSequence, 3, topology),
            raised(ShardedSequence, 30, topology, layout="spiral"),
            raised(ShardedSequence, 30, topology, masks.documents([0, 31])),
            raised(ShardedSequence, 30, topology, "causal"),
        ]
    one = torch.ones(1)
    dist.all_reduce(one)
    return messages, one.item()


def test_bad_input_is_refused_with_its_lengths_before_any_communication(
    world: Callable[[int], World],
) -> None:
    (messages, _), *_ = answers = world(4).run(refusals, timeout=30)
    assert [total for _, total in answers] == [4.0] * 4
    parts = [
        ("rank's part has 8 tokens along dimension 1", "(2, 30, 3)"),
        ("8 tokens", "(2, 7, 3)"),
        ("8 tokens", "()"),
        ("whole sequence has 30 tokens along dimension 1", "(2, 29, 3)"),
        ("30 tokens along dimension 0", "(2, 30, 3)"),
        ("30 tokens along dimension 3", "(2, 30, 3)"),
        ("30 tokens along dimension -4", "(2, 30, 3)"),
        ("over 4 ranks", "got 3"),
        ("contiguous, striped, zigzag, balanced", "'spiral'"),
        ("31 positions", "has 30"),
        ("ring_sp.masks", "got 'causal'"),
    ]
    for message, wanted in zip(messages, parts, strict=True):
        assert all(each in message for each in wanted), message or "no error"


def test_fewer_tokens_than_ranks_are_refused_counting_ulysses_peers() -> None:
    for size, peers in ((3, 1), (2, 2), (1, 5)):
        topology = station(0, size, 0, peers)
        assert ShardedSequence(size * peers, topology).lens == (1,) * (size * peers)
        with pytest.raises(ValueError, match=f"{size * peers} ranks.*; got {size * peers - 1}"):
            ShardedSequence(size * peers - 1, topology)


def test_one_rank_by_itself_holds_everything() -> None:
    seq = ShardedSequence(7)
    x = torch.randn(2, 7)
    assert seq.local_len == 7 and seq.lens == (7,)
    assert torch.equal(seq.shard(x), x) and torch.equal(seq.unshard(x), x)
    assert (seq.mask, seq.layout) == (masks.causal(), "zigzag")


@pytest.mark.parametrize("size", [1, 3])
def test_a_mask_that_is_not_windowed_limits_no_band_on_the_left_and_every_rank_knows(
    size: int,
) -> None:
    found = {}
    for name, (mask, _) in cases(24).items():
        plans = [
            ShardedSequence(24, station(rank, size), mask, kind).plan()
            for rank in range(size)
            for kind in layout.LAYOUTS
        ]
        (found[name],) = {plan.windowed for plan in plans}
        assert len({plan.num_regions for plan in plans}) == 1
        tiles = [tile for plan in plans for source in range(size) for tile in plan.tiles(source)]
        assert found[name] or all(band_of(tile).left is None for tile in tiles)
    assert [name for name, windowed in found.items() if not windowed] == [
        "full",
        "causal",
        "chunked",
        "documents",
    ]
    for limit in (22, 23):
        plan = ShardedSequence(24, station(0, 1), masks.sliding_window(limit)).plan()
        assert plan.windowed == (limit < 23)
