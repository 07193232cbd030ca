"""What a pass round the ring does to rounding, with all its stations played by one process."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import World
from oracle import attention
from ranks import groups, sequence
from ringed import Case, repeats
from torch import Tensor

from ring_sp import (
    ProcessGroupManager,
    ShardedSequence,
    explain,
    masks,
    passes,
    ring_attention,
)
from ring_sp.kernels import KERNELS, Call
from ring_sp.kernels.contract import Rows
from ring_sp.passes import Setting, Wire
from ring_sp.plan import Plan
from ring_sp.ring import SUMS, Axis, Message, Visit
from ring_sp.topology import Topology

HEADS, KV_HEADS, DIM = 4, 2, 64
LIMIT = 1.3
"""Error of a ring over that of one station by itself."""

each_kernel = pytest.mark.parametrize(
    ("name", "device"),
    [
        pytest.param("reference", "cpu"),
        *(pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in KERNELS),
    ],
)


def whole(seq_len: int, device: str) -> list[Tensor]:
    """q, k, v and dout of the whole sequence, in bf16."""
    make = torch.Generator().manual_seed(0)
    shapes = [(1, seq_len, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    made = [torch.randn(*shape, generator=make, dtype=torch.float64) for shape in shapes]
    return [x.to(device, torch.bfloat16) for x in made]


def parts(plan: Plan, number: int) -> list[tuple[int, slice, slice]]:
    """The sources of a visit, which of their tokens it has, and where."""
    if plan.gathering is None:
        return [(number, slice(None), slice(None))]
    gathering, rank = plan.gathering, plan.rank
    steps = range(len(gathering.steps))
    (step,) = (step for step in steps if gathering.number(rank, step) == number)
    places = gathering.places(rank, step).items()
    return [(source, at(gathering.seen(rank, source)), place) for source, place in places]


def at(tokens: range) -> slice:
    return slice(tokens.start, tokens.stop)


class Stations:
    """The stations of a ring of `size`, and what an exchange would do between them."""

    def __init__(
        self, size: int, seq_len: int, name: str, device: str, gather: int | None = None
    ) -> None:
        self.size, self.name = size, name
        self.q, self.k, self.v, self.dout = whole(seq_len, device)
        gather = gather if size > 1 else None
        self.sequences = [
            ShardedSequence(seq_len, Topology(ring=Axis(rank, size), gather=gather), masks.causal())
            for rank in range(size)
        ]
        self.kvs: list[Tensor] = []
        self.sums: dict[int, Tensor] = {}

    def shard(self, x: Tensor, rank: int) -> Tensor:
        return self.sequences[rank].shard(x)

    def show(self, plan: Plan, visit: Visit, message: Message) -> None:
        """Visits of one station in order; the sums of all are kept in `sums`, not sent home."""
        assert message.blocks is not None
        for number in plan.own_visits:
            if number == plan.rank:
                visit(self.kvs[number], number)
                continue
            sources = parts(plan, number)
            cut = [
                [block[:, tokens] for block in message.blocks(self.kvs[source])]
                for source, tokens, _ in sources
            ]
            joint = [torch.cat(blocks, 1).flatten() for blocks in zip(*cut, strict=True)]
            seen = visit(torch.cat(joint), number)
            if seen is None:
                continue
            seen = seen.to(message.sums_dtype)
            for source, tokens, place in sources:
                total = self.sums.get(source)
                if total is None:
                    dtype = torch.float32 if plan.gathering else seen.dtype
                    total = self.sums[source] = torch.zeros_like(self.kvs[source], dtype=dtype)
                for own, theirs in zip(message.blocks(total), message.blocks(seen), strict=True):
                    own[:, tokens] += theirs[:, place]

    def results(self) -> list[Tensor]:
        """out, dq, dk and dv of the whole sequence."""
        found: list[list[Tensor]] = []
        wire = Wire(1, KV_HEADS, DIM, DIM)
        ranks = range(self.size)
        self.kvs = [wire.join(self.shard(self.k, rank), self.shard(self.v, rank)) for rank in ranks]
        own: list[Tensor] = []
        for rank in ranks:
            plan = self.sequences[rank].plan()

            def show(_: Tensor, visit: Visit, message: Message, plan: Plan = plan) -> None:
                self.show(plan, visit, message)

            setting = Setting(plan, KERNELS[self.name], DIM**-0.5, None, exchange=show)
            q = self.shard(self.q, rank)
            out, lse = passes.attend(q, self.kvs[rank], wire, setting)
            rows = Rows(out, lse, self.shard(self.dout, rank))
            with mock.patch.object(passes, "_sum", lambda _, kept, __: kept):
                dq, kept = passes.gradients(q, self.kvs[rank], wire, rows, setting)
            own.append(kept)
            found.append([out, dq])
        for rank in ranks:
            dkv = passes._sum(self.kvs[rank], own[rank], self.sums.get(rank))
            found[rank] += wire.split(dkv)
        return [self.joined([each[at] for each in found]) for at in range(4)]

    def joined(self, shards: list[Tensor]) -> Tensor:
        whole = shards[0].new_empty(1, self.sequences[0].seq_len, *shards[0].shape[2:])
        for place, shard in zip(self.sequences, shards, strict=True):
            whole[:, place.positions(shard.device)] = shard
        return whole


def exact(seq_len: int, device: str) -> list[Tensor]:
    q, k, v, dout = (x.double() for x in whole(seq_len, device))
    trained = [x.requires_grad_() for x in (q, k, v)]
    visible = torch.ones(seq_len, seq_len, dtype=torch.bool, device=device).tril()
    out, _ = attention(q, k, v, visible)
    return [out.detach(), *torch.autograd.grad(out, trained, dout)]


def errors(found: list[Tensor], true: list[Tensor]) -> list[float]:
    """Of out, dq, dk and dv: norm of the difference over the norm."""
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, true, strict=True)]


@each_kernel
@pytest.mark.parametrize("gather", [None, 2, 15], ids=["ring", "gather:2", "gather:15"])
def test_rounding_hardly_grows_with_the_ring(name: str, device: str, gather: int | None) -> None:
    seq_len = 512 if device == "cpu" else 4096
    call = Call(device, torch.bfloat16, DIM, DIM, scale=DIM**-0.5)
    reason = KERNELS[name].refusal(call)
    if reason:
        pytest.skip(reason)
    true = exact(seq_len, device)
    alone = errors(Stations(1, seq_len, name, device).results(), true)
    assert max(alone) < 1e-2
    for size in (2, 4, 8, 16):
        ring = errors(Stations(size, seq_len, name, device, gather).results(), true)
        for mine, own, result in zip(ring, alone, ("out", "dq", "dk", "dv"), strict=True):
            assert mine < LIMIT * own, (size, result, mine / own)


def bytes_of_a_backward(
    heads: tuple[int, int], by_queries: bool | None
) -> tuple[int, list[Tensor]]:
    """Bytes that this rank sends in a backward, in the direction that is asked for (None: the one
    that is chosen), and the gradients.
    """
    seq = sequence({"ring": 3}, 37)
    make = torch.Generator().manual_seed(dist.get_rank())
    q, k, v = (
        torch.randn(2, seq.local_len, *shape, generator=make, dtype=torch.float64).requires_grad_()
        for shape in ((heads[0], 8), (heads[1], 8), (heads[1], 5))
    )
    out = ring_attention(q, k, v, seq)
    dout = torch.randn(*out.shape, generator=make, dtype=torch.float64)
    forced: dict[str, Any] = {} if by_queries is None else {"side_effect": lambda *_: by_queries}
    with (
        mock.patch.object(passes, "queries_travel", wraps=passes.queries_travel, **forced),
        mock.patch.object(dist, "batch_isend_irecv", wraps=dist.batch_isend_irecv) as batches,
    ):
        grads = torch.autograd.grad(out, (q, k, v), dout)
    ops = [op for call in batches.call_args_list for op in call.args[0] if op.op is dist.isend]
    return sum(op.tensor.numel() * op.tensor.element_size() for op in ops), list(grads)


@pytest.mark.parametrize(("heads", "turned"), [((4, 4), True), ((4, 2), False), ((4, 1), False)])
def test_the_backward_moves_whichever_side_is_fewer_bytes(
    world: Callable[[int], World], heads: tuple[int, int], turned: bool
) -> None:
    chosen, keys, queries = (
        world(3).run(bytes_of_a_backward, heads, way) for way in (None, False, True)
    )
    sent = [sum(found for found, _ in ranks) for ranks in (chosen, keys, queries)]
    assert sent[0] == min(sent) and (sent[2] < sent[1]) == turned
    for (_, mine), (_, one), (_, other) in zip(chosen, keys, queries, strict=True):
        for found, a, b in zip(mine, one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
            assert torch.equal(found, b if turned else a)


def sums_sent(
    sums_dtype: torch.dtype | None, kv_heads: int
) -> tuple[set[torch.dtype], bool, float]:
    """The dtypes in which this rank sends sums, whether their bytes are those of `explain`, and how
    far dk is from float64's.
    """
    group = groups(ring=3).group("sequence")
    assert group is not None
    topology = ProcessGroupManager.from_group(group, sums_dtype=sums_dtype).topology
    make = torch.Generator().manual_seed(3)
    whole = [torch.randn(1, 96, h, 16, generator=make) for h in (4, kv_heads, kv_heads, 4)]
    found = []
    for place, kind in (ShardedSequence(96, topology), torch.bfloat16), (ShardedSequence(96), None):
        q, k, v, dout = (place.shard(x.bfloat16().to(kind or torch.float64)) for x in whole)
        trained = [x.requires_grad_() for x in (q, k, v)]
        out = ring_attention(q, k, v, place)
        with mock.patch.object(dist, "batch_isend_irecv", wraps=dist.batch_isend_irecv) as batches:
            found.append(torch.autograd.grad(out, trained, dout)[1])
        if kind:
            ops = [op for call in batches.call_args_list for op in call.args[0]]
            load = explain(q, k, v, place).loads[topology.rank].backward_sums
    sums = [op.tensor for op in ops if op.op is dist.isend and op.tag == SUMS]
    mine, true = found[0].double(), ShardedSequence(96, topology).shard(found[1])
    sent = sum(x.numel() * x.element_size() for x in sums)
    return {x.dtype for x in sums}, sent == load, ((mine - true).norm() / true.norm()).item()


@pytest.mark.parametrize("kv_heads", [1, 4], ids=["keys travel", "queries travel"])
@pytest.mark.parametrize("asked", [None, torch.float32, torch.bfloat16], ids=str)
def test_sums_travel_in_the_dtype_that_was_asked_for(
    world: Callable[[int], World], asked: torch.dtype | None, kv_heads: int
) -> None:
    for dtypes, as_explained, error in world(3).run(sums_sent, asked, kv_heads):
        assert dtypes == {asked or torch.float32}
        assert as_explained and error < 6e-3


def test_two_runs_give_the_same_bits(world: Callable[[int], World]) -> None:
    for sizes in ({"ring": 4}, {"ring": 2, "ulysses": 2}):
        assert all(world(4).run(repeats, sizes, Case(seq_len=29, dtype=torch.float32)))
