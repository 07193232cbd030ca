"""What explain says, against what the ranks of a world send and against masks written out."""

import inspect
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import chain, product
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import World
from foretold import calls, foretold, places, station
from oracle import dense_mask
from ranks import groups, raised
from ringed import Case, Heads, inputs
from visibility import cases

from ring_sp import Explanation, ShardedSequence, explain, layout, masks, ring_attention
from ring_sp.fit import Options
from ring_sp.kernels import KERNELS, Call
from ring_sp.ring import Axis
from ring_sp.topology import Topology

Sizes = dict[str, int]
Counts = dict[str, int]

TOPOLOGIES: list[tuple[int, Sizes, Heads]] = [
    (1, {}, (4, 2)),
    (2, {"ring": 2}, (4, 2)),
    (2, {"ulysses": 2}, (4, 1)),
    (3, {"ring": 3}, (4, 4)),
    (3, {"ulysses": 3}, (6, 2)),
    (4, {"ring": 4}, (4, 1)),
    (4, {"outer": 2, "ring": 2}, (4, 2)),
    (4, {"ring": 2, "ulysses": 2}, (6, 3)),
    (4, {"tensor": 2, "ring": 2}, (4, 2)),
    (8, {"ring": 8}, (4, 2)),
    (8, {"outer": 2, "ring": 4}, (4, 4)),
    (8, {"outer": 4, "ring": 2}, (4, 1)),
    (8, {"ring": 4, "ulysses": 2}, (4, 1)),
    (8, {"ring": 2, "ulysses": 4}, (8, 2)),
    (8, {"outer": 2, "ring": 2, "ulysses": 2}, (4, 2)),
    (3, {"ring": 3, "gather": 1}, (4, 4)),
    (4, {"ring": 4, "gather": 2}, (4, 2)),
    (4, {"ring": 2, "ulysses": 2, "gather": 1}, (4, 2)),
    (8, {"outer": 8, "gather": 7}, (4, 2)),
]


def seen_and_told(
    sizes: Sizes, asked: list[tuple[Case, bool]]
) -> list[tuple[Counts, Counts, Explanation]]:
    """What this rank sent in the forward and in the backward of each call, and what explain says
    here.
    """
    topology = groups(**sizes).topology
    found = []
    for case, return_lse in asked:
        (q, k, v, sinks), (dout, dlse) = inputs(case, 0)
        queries, keys = places(case, topology)
        parts = [x.detach() for x in (queries.shard(q), keys.shard(k), keys.shard(v), sinks)]
        q, k, v, sinks = (x.requires_grad_() for x in parts)
        with (
            mock.patch.object(dist, "batch_isend_irecv", wraps=dist.batch_isend_irecv) as batches,
            mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as trades,
        ):
            results = ring_attention(
                q,
                k,
                v,
                queries,
                None if keys is queries else keys,
                sinks=sinks if case.sinks else None,
                return_lse=return_lse,
            )
            forward = counted(batches, trades)
            returned = results if isinstance(results, tuple) else (results,)
            cotangents = (queries.shard(dout), queries.shard(dlse, 2))[: len(returned)]
            torch.autograd.grad(returned, (q, k, v), cotangents)
            found.append((forward, counted(batches, trades), foretold(case, return_lse, topology)))
    return found


def counted(batches: mock.Mock, trades: mock.Mock) -> Counts:
    """Ranks that were sent data, and bytes to other ranks, since the last count."""
    sent = [[op for op in call.args[0] if op.op is dist.isend] for call in batches.call_args_list]
    hops, heads = sum(len({op.peer for op in batch if op.tag == 0}) for batch in sent), 0
    for call in trades.call_args_list:
        _, traded, _, splits = call.args
        heads += (sum(splits) - splits[dist.get_rank(call.kwargs["group"])]) * traded[0].nbytes
    batches.reset_mock()
    trades.reset_mock()
    data, sums = ([op.tensor.nbytes for op in chain(*sent) if op.tag == tag] for tag in (0, 1))
    return {"hops": hops, "kv": sum(data), "sums": sum(sums), "heads": heads}


@pytest.mark.parametrize(("size", "sizes", "heads"), TOPOLOGIES, ids=str)
def test_each_rank_sends_what_explain_says_without_processes(
    world: Callable[[int], World], size: int, sizes: Sizes, heads: Heads
) -> None:
    asked = calls(str(sizes), heads)
    by_rank = world(size).run(seen_and_told, sizes, asked)
    sharing = size // sizes.get("tensor", 1)
    for number, (case, return_lse) in enumerate(asked):
        told = foretold(case, return_lse, station(sizes, 0))
        assert len(told.loads) == sharing
        for rank in range(size):
            forward, backward, there = by_rank[rank][number]
            assert there == told, (case, rank)
            load = told.loads[rank // sizes.get("tensor", 1)]
            says = load.hops, load.forward_kv, 0, load.forward_heads
            assert tuple(forward.values()) == says, (case, rank)
            says = load.backward_hops, load.backward_data, load.backward_sums, load.backward_heads
            assert tuple(backward.values()) == says, (case, rank)
            assert load.forward_bytes == sum(forward.values()) - load.hops
            assert load.backward_bytes == sum(backward.values()) - load.backward_hops
        loads = [asdict(load) for load in told.loads]
        assert asdict(told.total) == {name: sum(load[name] for load in loads) for name in loads[0]}


@pytest.mark.parametrize("sizes", [sizes for _, sizes, _ in TOPOLOGIES], ids=str)
@pytest.mark.parametrize("name", layout.LAYOUTS)
def test_work_is_what_each_rank_sees_of_the_mask(sizes: Sizes, name: str) -> None:
    size = station(sizes, 0).size
    for mask, kv_len in product(cases(24), (None, 31)):
        case = Case(mask, name, 29, kv_len, heads=(24, 24))
        told = foretold(case, False, station(sizes, 0))
        visible = dense_mask(cases(max(29, kv_len or 0))[mask][1], 29, kv_len or 29)
        pairs, tiles = [], []
        for rank in range(size):
            queries, keys = places(case, station(sizes, rank))
            rows = [p for span in queries.ring_shards[queries.topology.ring_rank] for p in span]
            pairs.append(int(visible[rows].sum()))
            stations = range(queries.topology.ring_size)
            tiles.append(sum(len(queries.plan(keys).tiles(source)) for source in stations))
            assert told.loads[rank].tokens == queries.local_len
            assert told.loads[rank].kv_tokens == keys.local_len
        assert [load.pairs for load in told.loads] == pairs, mask
        assert [load.tiles for load in told.loads] == tiles, mask
        assert told.total.pairs * told.heads == visible.sum() * 24, mask
        assert told.shares == tuple(count / max(pairs) for count in pairs)
        assert told.balance == pytest.approx(sum(pairs) / size / max(pairs))


@pytest.mark.parametrize(
    ("sizes", "exchange", "heads"),
    [
        ({}, "one rank", (4, 1, 1)),
        ({"ring": 3}, "ring", (4, 1, 1)),
        ({"outer": 3}, "ring", (4, 1, 1)),
        ({"outer": 2, "ring": 3}, "double ring", (4, 1, 1)),
        ({"ulysses": 2}, "all-to-all", (2, 1, 2)),
        ({"ulysses": 4, "ring": 2}, "all-to-all, ring", (1, 1, 4)),
        ({"ulysses": 2, "ring": 2, "outer": 2}, "all-to-all, double ring", (2, 1, 2)),
        ({"ring": 4, "gather": 2}, "gather:2", (4, 1, 1)),
        ({"ring": 4, "ulysses": 2, "gather": 3}, "all-to-all, gather:3", (2, 1, 2)),
    ],
    ids=str,
)
def test_it_names_exchange_sizes_layout_and_heads(
    sizes: Sizes, exchange: str, heads: tuple[int, int, int]
) -> None:
    told = foretold(Case(layout="striped", heads=(4, 1)), False, station(sizes, 0))
    assert (told.exchange, told.layout) == (exchange, "striped")
    assert told.backward_travels == ("queries" if heads[0] == heads[1] else "keys")
    named = {name: size for name, size in sizes.items() if name != "gather"}
    assert told.sizes == {"outer": 1, "ring": 1, "ulysses": 1} | named
    assert (told.heads, told.kv_heads, told.kv_copies) == heads


def noting(asked: list[Call], reason: str | None) -> Callable[[Call], str | None]:
    """A kernel's refusal that notes what it was asked."""

    def refusal(call: Call) -> str | None:
        asked.append(call)
        return reason

    return refusal


def test_it_names_the_kernel_that_a_call_gets_and_why_others_cannot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reasons = {"flash4": "too small", "cudnn": None, "triton": "too cold", "flash": None}
    asked: list[Call] = []
    for name, kernel in KERNELS.items():
        monkeypatch.setattr(kernel, "refusal", noting(asked, reasons.get(name)))
    x, seq = torch.empty(1, 8, 2, 16), ShardedSequence(8, mask=masks.sliding_window(2))
    refusals = {name: reason for name, reason in reasons.items() if reason}
    for name, chosen in (("auto", "cudnn"), ("flash", "flash"), ("triton", None)):
        told = explain(x, x, x, seq, kernel=name, softcap=1.0, device_type="cuda:1")
        assert (told.kernel, told.refusals) == (chosen, refusals)
    wanted = Call("cuda", torch.float32, 16, 16, softcap=True, scale=0.25, windowed=True)
    assert set(asked) == {wanted}
    assert "none" in str(told).splitlines()[0] and "triton cannot: too cold" in str(told)


def test_kernels_are_asked_the_same_by_explain_and_by_the_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Call] = []
    for name, kernel in KERNELS.items():
        answer = None if name == "reference" else "no"
        monkeypatch.setattr(kernel, "refusal", noting(asked, answer))
    x, sinks = torch.randn(1, 24, 2, 16), torch.zeros(2)
    mask = masks.documents([0, 9, 24], masks.sliding_window(2))
    changes: list[dict[str, Any]] = [{"scale": 0.5}, {"softcap": 2.0}, {"sinks": sinks}]
    changes += [{}, {"return_lse": True}, {"kernel": "reference"}]
    for options in changes:
        seq = ShardedSequence(24, mask=mask)
        explain(x, x, x, seq, trained=False, **options)
        told, asked[:] = set(asked), []
        ring_attention(x, x, x, seq, **options)
        assert told == set(asked), options
        asked.clear()


def test_options_are_those_of_the_call() -> None:
    call = inspect.signature(ring_attention).parameters
    for name, value in Options()._asdict().items():
        assert call[name].default == value
    named = {*Options._fields, *inspect.signature(explain).parameters}
    assert named == {*call, "device_type", "trained", "options"}
    x = torch.empty(1, 8, 2, 4)
    with pytest.raises(TypeError, match="sofcap"):
        explain(x, x, x, ShardedSequence(8), sofcap=1.0)


def test_what_the_call_refuses_explain_refuses() -> None:
    x, seq = torch.zeros(1, 8, 2, 4), ShardedSequence(8)
    prefix = ShardedSequence(8, mask=masks.prefix_lm(3))
    wrong: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x[0], x, x, seq), {}),
        ((x, x.double(), x, seq), {}),
        ((x[:, 1:], x, x, seq), {}),
        ((x, x[:, 1:], x[:, 1:], seq), {}),
        ((x, x, x, 8), {}),
        ((x, x, x, seq, prefix), {}),
        ((x, x, x, seq), {"sinks": torch.zeros(3)}),
        ((x, x, x, seq), {"kernel": "fast"}),
        ((x, x, x, seq), {"softcap": -1.0}),
        ((x, x, x, seq), {"dropout_p": 0.1}),
    ]
    for args, options in wrong:
        message = raised(explain, *args, **options)
        assert message and message == raised(ring_attention, *args, **options)
    over = ShardedSequence(24, Topology(ulysses=Axis(0, 3)))
    assert "over 3 ranks" in raised(explain, x, x, x, over)


def test_meta_tensors_need_a_device_type() -> None:
    x, seq = torch.empty(1, 8, 2, 4, device="meta"), ShardedSequence(8)
    assert "give device_type" in raised(explain, x, x, x, seq)
    assert "got 'gpu'" in raised(explain, x, x, x, seq, device_type="gpu")
    assert explain(x, x, x, seq, device_type="cpu").kernel is not None


def test_a_mask_that_hides_everything_leaves_nothing_to_do() -> None:
    x = torch.empty(1, 2, 2, 4)
    told = explain(x, x, x, ShardedSequence(8, station({"ring": 4}, 0), masks.documents([0])))
    assert replace(told.total, tokens=0, kv_tokens=0) == type(told.total)(*[0] * 12)
    assert told.shares == (1.0,) * 4 and told.balance == 1.0


TABLE = """\
kernel    reference
          flash4 cannot: too small
          cudnn cannot: too small
          triton cannot: too small
          flash could, and was not chosen
exchange  ring (outer 1, ring 4, ulysses 1); keys travel in backward
layout    contiguous; balance 0.938
heads     4 a rank, 2 of keys, each sent 1 x

 rank  share  tokens  kv tokens     pairs  tiles  visits  hops  backward hops  forward k\
v  backward data  backward sums
    0  0.750    4096       4096   6294528      1       1     1              1     4.0 Mi\
B        4.0 MiB            0 B
  1-2  1.000    4096       4096   8392704      2       2     1              1     4.0 Mi\
B        4.0 MiB        8.0 MiB
    3  1.000    4096       4096   8392704      2       2     0              0         0 \
B            0 B        8.0 MiB
total          16384      16384  31472640      7       7     3              3    12.0 Mi\
B       12.0 MiB       24.0 MiB
"""


def test_the_table_reads_well(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KERNELS:
        reason = None if name in {"flash", "reference"} else "too small"
        monkeypatch.setattr(KERNELS[name], "refusal", noting([], reason))
    q, k = (
        torch.empty(1, 2**12, heads, 128, dtype=torch.bfloat16, device="meta") for heads in (4, 2)
    )
    mask = masks.sliding_window(2**11)
    sequence = ShardedSequence(2**14, station({"ring": 4}, 0), mask, "contiguous")
    told = explain(q, k, k, sequence, kernel="reference", device_type="cuda")
    assert str(told).splitlines() == TABLE.splitlines()
