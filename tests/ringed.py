"""Calls of ring_attention, and how far each result is from unsharded attention."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from conftest import World
from oracle import attention, dense_mask
from ranks import groups
from torch import Tensor
from visibility import cases

from ring_sp import ShardedSequence, passes, plan, ring_attention
from ring_sp.kernels.dropout import Dropout
from ring_sp.ring import ring_pass

Heads = tuple[int, int]


@contextmanager
def ring_passes() -> Iterator[mock.Mock]:
    """Counts passes round a ring, of keys and of queries."""
    with (
        mock.patch.object(plan, "ring_pass", wraps=ring_pass) as counter,
        mock.patch.object(passes, "ring_pass", counter),
    ):
        yield counter


@dataclass(frozen=True)
class Case:
    """One call of ring_attention and what surrounds it."""

    mask: str = "causal"
    layout: str = "zigzag"
    seq_len: int = 29
    kv_len: int | None = None
    heads: Heads = (4, 2)
    head_dim: int = 8
    v_head_dim: int = 5
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    dtype: torch.dtype = torch.float64
    kernel: str = "auto"
    dropout_p: float = 0.0
    lse: bool = True
    """Whether lse is asked for, and has a gradient."""

    @property
    def seed(self) -> int | None:
        """Of dropout; it fills both words of a key."""
        return 0x123456789ABCDE if self.dropout_p else None

    @property
    def accumulation(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def relative(got: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest wanted value; where both are infinite they must agree."""
    if got.shape != wanted.shape or not torch.equal(got.isfinite(), wanted.isfinite()):
        return float("inf")
    got, wanted = got.masked_fill(got.isinf(), 0), wanted.masked_fill(wanted.isinf(), 0)
    return ((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)).item()


def inputs(case: Case, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Whole q, k, v, sinks and the cotangents of out and lse; the same on every rank that asks
    with one seed.
    """
    make = torch.Generator().manual_seed(seed)
    kv_len, (heads, kv_heads) = case.kv_len or case.seq_len, case.heads
    shapes = [
        (2, case.seq_len, heads, case.head_dim),
        (2, kv_len, kv_heads, case.head_dim),
        (2, kv_len, kv_heads, case.v_head_dim),
        (heads,),
        (2, case.seq_len, heads, case.v_head_dim),
        (2, heads, case.seq_len),
    ]
    # Drawn on the CPU, so that every device sees the same numbers.
    made = [
        torch.randn(*shape, generator=make, dtype=torch.float64, device="cpu").to(
            torch.get_default_device(), case.dtype
        )
        for shape in shapes
    ]
    return [x.requires_grad_() for x in made[:4]], [made[4], made[5].to(case.accumulation)]


def wanted(case: Case, seed: int) -> list[Tensor]:
    """Whole out, lse, dq, dk, dv, dsinks, unsharded."""
    (q, k, v, sinks), (dout, dlse) = inputs(case, seed)
    visible = dense_mask(cases(max(q.shape[1], k.shape[1]))[case.mask][1], q.shape[1], k.shape[1])
    kept = None
    if case.seed is not None:
        q_at, k_at = (torch.arange(x.shape[1], dtype=torch.int32) for x in (q, k))
        drops = Dropout(case.dropout_p, case.seed, q_at, k_at, 0, q.shape[2])
        kept = drops.kept(q.shape[0], q.shape[2], slice(None), slice(None), q.dtype)
    given = sinks if case.sinks else None
    out, lse = attention(q, k, v, visible, case.scale, case.softcap, given, kept)
    finite = lse.masked_fill(lse.isinf(), 0)
    loss = (out * dout).sum() + case.lse * (finite * dlse).sum() + 0 * sinks.sum()
    return [out, lse, *torch.autograd.grad(loss, (q, k, v, sinks))]


def got(case: Case, seed: int, queries: ShardedSequence, keys: ShardedSequence) -> list[Tensor]:
    """This rank's out, lse, dq, dk, dv, dsinks; lse is empty where it was not asked for."""
    (q, k, v, sinks), (dout, dlse) = inputs(case, seed)
    parts = [x.detach() for x in (queries.shard(q), keys.shard(k), keys.shard(v), sinks)]
    parts = [x.requires_grad_() for x in parts]
    found = ring_attention(
        parts[0],
        parts[1],
        parts[2],
        queries,
        None if keys is queries else keys,
        scale=case.scale,
        softcap=case.softcap,
        sinks=parts[3] if case.sinks else None,
        dropout_p=case.dropout_p,
        dropout_seed=case.seed,
        kernel=case.kernel,
        return_lse=case.lse,
    )
    out, lse = found if isinstance(found, tuple) else (found, parts[0].new_empty(0))
    loss = (out * queries.shard(dout)).sum() + 0 * parts[3].sum()
    if case.lse:
        loss = loss + (lse.masked_fill(lse.isinf(), 0) * queries.shard(dlse, 2)).sum()
    return [out, lse, *torch.autograd.grad(loss, parts)]


def errors(sizes: dict[str, int], checked: list[Case]) -> list[tuple[float, str, Case]]:
    """On one rank: how far each result is from unsharded attention, worst case first."""
    manager, found = groups(**sizes), []
    seed = manager.rank("data") * 10 + manager.rank("tensor")
    for case in checked:
        seq_len, kv_len = case.seq_len, case.kv_len or case.seq_len
        mask = cases(max(seq_len, kv_len))[case.mask][0]
        queries = ShardedSequence(seq_len, manager.topology, mask, case.layout)
        keys = (
            queries
            if case.kv_len is None
            else ShardedSequence(kv_len, manager.topology, layout=case.layout)
        )
        out, lse, dq, dk, dv, dsinks = wanted(case, seed)
        locals_ = [
            queries.shard(out),
            queries.shard(lse, 2),
            queries.shard(dq),
            keys.shard(dk),
            keys.shard(dv),
        ]
        results = got(case, seed, queries, keys)
        assert results[0].dtype == results[2].dtype == case.dtype
        results[5] = results[5].contiguous()
        torch.distributed.all_reduce(results[5], group=manager.group("sequence"))
        for name, mine, oracle in zip(
            ("out", "lse", "dq", "dk", "dv", "dsinks"), results, [*locals_, dsinks], strict=True
        ):
            if case.lse or name != "lse":
                found.append((relative(mine, oracle), name, case))
    return sorted(found, key=lambda entry: entry[0], reverse=True)


def assert_exact(
    ranks: World, sizes: dict[str, int], checked: list[Case], bound: float = 1e-12
) -> None:
    worst = max(
        (found[0] for found in ranks.run(errors, sizes, checked)), key=lambda entry: entry[0]
    )
    assert worst[0] < bound, worst


def repeats(sizes: dict[str, int], case: Case) -> bool:
    """Whether two runs give this rank the same bits, in torch's deterministic mode."""
    mask = cases(case.seq_len)[case.mask][0]
    place = ShardedSequence(case.seq_len, groups(**sizes).topology, mask, case.layout)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        first, second = (got(case, 0, place, place) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    return all(map(torch.equal, first, second))
