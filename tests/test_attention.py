from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle

import pytest
import torch
from conftest import World
from oracle import attention, dense_mask
from ranks import groups, raised, sequence
from torch import Tensor
from visibility import cases

from ring_sp import ShardedSequence, layout, masks, ring_attention

MASKS = tuple(cases(24))
Heads = tuple[int, int]


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

    @property
    def accumulation(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def relative(got: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest wanted value; where both are infinite they must agree."""
    if got.shape != wanted.shape or not torch.equal(got.isinf(), wanted.isinf()):
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
    made = [
        torch.randn(*shape, generator=make, dtype=torch.float64).to(case.dtype) for shape in shapes
    ]
    return [x.requires_grad_() for x in made[:4]], [made[4], made[5].to(case.accumulation)]


def wanted(case: Case, seed: int) -> list[Tensor]:
    """Whole out, lse, dq, dk, dv, dsinks, unsharded."""
    (q, k, v, sinks), (dout, dlse) = inputs(case, seed)
    visible = dense_mask(cases(max(q.shape[1], k.shape[1]))[case.mask][1], q.shape[1], k.shape[1])
    out, lse = attention(q, k, v, visible, case.scale, case.softcap, sinks if case.sinks else None)
    finite = lse.masked_fill(lse.isinf(), 0)
    loss = (out * dout).sum() + (finite * dlse).sum() + 0 * sinks.sum()
    return [out, lse, *torch.autograd.grad(loss, (q, k, v, sinks))]


def got(case: Case, seed: int, queries: ShardedSequence, keys: ShardedSequence) -> list[Tensor]:
    """This rank's out, lse, dq, dk, dv, dsinks."""
    (q, k, v, sinks), (dout, dlse) = inputs(case, seed)
    parts = [x.detach() for x in (queries.shard(q), keys.shard(k), keys.shard(v), sinks)]
    parts = [x.requires_grad_() for x in parts]
    out, lse = ring_attention(
        parts[0],
        parts[1],
        parts[2],
        queries,
        None if keys is queries else keys,
        scale=case.scale,
        softcap=case.softcap,
        sinks=parts[3] if case.sinks else None,
        return_lse=True,
    )
    finite = lse.masked_fill(lse.isinf(), 0)
    loss = (
        (out * queries.shard(dout)).sum()
        + (finite * queries.shard(dlse, 2)).sum()
        + 0 * parts[3].sum()
    )
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
        results[5] = results[5].contiguous()
        torch.distributed.all_reduce(results[5], group=manager.group("sequence"))
        for name, mine, oracle in zip(
            ("out", "lse", "dq", "dk", "dv", "dsinks"), results, [*locals_, dsinks], strict=True
        ):
            found.append((relative(mine, oracle), name, case))
    return sorted(found, key=lambda entry: entry[0], reverse=True)


def assert_exact(
    ranks: World, sizes: dict[str, int], checked: list[Case], bound: float = 1e-12
) -> None:
    worst = max(
        (found[0] for found in ranks.run(errors, sizes, checked)), key=lambda entry: entry[0]
    )
    assert worst[0] < bound, worst


TOPOLOGIES: list[tuple[int, dict[str, int], Heads]] = [
    (1, {}, (4, 2)),
    (2, {"ring": 2}, (4, 4)),
    (2, {"ulysses": 2}, (4, 1)),
    (3, {"ring": 3}, (4, 1)),
    (3, {"ulysses": 3}, (6, 2)),
    (4, {"ring": 4}, (4, 2)),
    (4, {"outer": 2, "ring": 2}, (4, 2)),
    (4, {"ring": 2, "ulysses": 2}, (6, 3)),
    (4, {"ulysses": 4}, (8, 2)),
    (8, {"ring": 8}, (4, 2)),
    (8, {"outer": 2, "ring": 4}, (4, 4)),
    (8, {"outer": 4, "ring": 2}, (4, 1)),
    (8, {"ring": 4, "ulysses": 2}, (4, 2)),
    (8, {"ring": 2, "ulysses": 4}, (8, 2)),
    (8, {"outer": 2, "ring": 2, "ulysses": 2}, (4, 2)),
    (8, {"tensor": 2, "ring": 2}, (4, 2)),
]


@pytest.mark.parametrize(("size", "sizes", "heads"), TOPOLOGIES, ids=str)
def test_equals_unsharded_attention(
    world: Callable[[int], World],
    size: int,
    sizes: dict[str, int],
    heads: Heads,
) -> None:
    lengths = cycle([29, 24, 37, max(size, 4)])
    assert_exact(
        world(size),
        sizes,
        [Case(mask, name, next(lengths), heads=heads) for mask in MASKS for name in layout.LAYOUTS],
    )


@pytest.mark.parametrize(
    ("size", "sizes", "heads"),
    [
        (1, {}, (4, 2)),
        (4, {"ring": 4}, (4, 2)),
        (4, {"ring": 2, "ulysses": 2}, (4, 1)),
        (8, {"outer": 2, "ring": 4}, (4, 2)),
    ],
    ids=str,
)
def test_equals_unsharded_attention_with_every_option(
    world: Callable[[int], World],
    size: int,
    sizes: dict[str, int],
    heads: Heads,
) -> None:
    case = Case(heads=heads, seq_len=31)
    assert_exact(
        world(size),
        sizes,
        [
            replace(case, scale=0.7),
            replace(case, scale=0.0),
            replace(case, softcap=1.5),
            replace(case, sinks=True),
            replace(case, sinks=True, softcap=2.0, scale=0.3, mask="documents_window"),
            replace(case, v_head_dim=8),
            replace(case, v_head_dim=16),
            replace(case, heads=(4, 4)),
            *(
                replace(case, kv_len=kv_len, mask=mask, layout=name)
                for kv_len in (17, 47)
                for mask in ("full", "causal", "window")
                for name in layout.LAYOUTS
            ),
        ],
    )


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_low_precision_stays_near_its_own_rounding(
    world: Callable[[int], World],
    dtype: torch.dtype,
    bound: float,
) -> None:
    low = [Case(mask, dtype=dtype, seq_len=48) for mask in ("causal", "documents", "spans")]
    found = world(4).run(low_precision_errors, low)
    for alone, ringed in (pair for rank in found for pair in rank):
        assert ringed < bound
        assert ringed < 2 * alone + 1e-7


def low_precision_errors(checked: list[Case]) -> list[tuple[float, float]]:
    """For out and gradients: the error of one rank by itself, and of the ring, against float64
    on the same numbers.
    """
    found = []
    for case in checked:
        mask = cases(case.seq_len)[case.mask][0]
        ring = ShardedSequence(case.seq_len, groups(ring=4).topology, mask)
        alone = ShardedSequence(case.seq_len, mask=mask)
        (q, k, v, _), (dout, dlse) = inputs(case, 0)
        exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
        out, lse = ring_attention(exact[0], exact[1], exact[2], alone, return_lse=True)
        truth = [out, lse, *torch.autograd.grad((out, lse), exact, (dout.double(), dlse.double()))]
        dims = (1, 2, 1, 1, 1)
        for true, one, mine, dim in zip(
            truth, got(case, 0, alone, alone), got(case, 0, ring, ring), dims, strict=False
        ):
            found.append(
                (relative(one.double(), true), relative(ring.unshard(mine, dim).double(), true))
            )
    return found


def poisoned_gradient_errors() -> list[float]:
    """Rank 3 of a contiguous ring holds only padding, rank 0 sees nothing and is seen by nobody."""
    seq = sequence({"ring": 4}, 32, mask=masks.documents([0, 24]), layout="contiguous")
    q, k, v = (torch.randn(1, 8, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out, lse = ring_attention(q, k, v, seq, return_lse=True)
    grads = torch.autograd.grad(
        (out, lse), (q, k, v), (torch.randn_like(out), torch.randn_like(lse))
    )
    if torch.distributed.get_rank() < 3:
        return [float(out.isfinite().all() and lse.isfinite().all())]
    return [
        out.abs().max().item(),
        float((lse == -torch.inf).all()),
        *(g.abs().max().item() for g in grads),
    ]


def test_a_rank_that_sees_nothing_gives_zeros(world: Callable[[int], World]) -> None:
    *others, idle = world(4).run(poisoned_gradient_errors)
    assert others == [[1.0]] * 3
    assert idle == [0.0, 1.0, 0.0, 0.0, 0.0]


def test_nothing_but_padding() -> None:
    seq = ShardedSequence(6, mask=masks.documents([0]))
    q = torch.randn(1, 6, 2, 4, requires_grad=True)
    out, lse = ring_attention(q, q, q, seq, return_lse=True)
    out.sum().backward()
    assert (
        out.eq(0).all() and lse.eq(-torch.inf).all() and q.grad is not None and q.grad.eq(0).all()
    )


def test_keeps_only_inputs_out_and_lse() -> None:
    seq = ShardedSequence(16)
    kept: list[int] = []

    def note(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    q, k, v = (torch.randn(1, 16, 4, 8, requires_grad=True) for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        ring_attention(q, k, v, seq)
    assert sorted(kept) == sorted([q.numel(), k.numel() + v.numel(), q.numel(), 4 * 16])


def test_a_second_derivative_is_refused() -> None:
    seq = ShardedSequence(8)
    q = torch.randn(1, 8, 2, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(ring_attention(q, q, q, seq).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_checkpointing_gives_the_same_gradients(world: Callable[[int], World]) -> None:
    assert all(world(4).run(checkpointed_equals_plain))


def checkpointed_equals_plain() -> bool:
    from torch.utils.checkpoint import checkpoint

    seq = sequence({"ring": 4}, 19)
    q, k, v = (torch.randn(2, seq.local_len, 2, 4, requires_grad=True) for _ in range(3))
    grad = torch.randn(2, seq.local_len, 2, 4)
    plain = torch.autograd.grad(ring_attention(q, k, v, seq), (q, k, v), grad)
    again = torch.autograd.grad(
        checkpoint(ring_attention, q, k, v, seq, use_reentrant=False), (q, k, v), grad
    )
    return all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def bad_calls() -> dict[str, str]:
    """The messages of calls that are wrong on every rank, and of some that only rank 1 gets
    wrong.
    """

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(*shape, dtype=dtype)

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        seq_len: int = 16,
        sizes: dict[str, int] | None = None,
        mask: masks.Mask | None = None,
        **options: object,
    ) -> str:
        seq = sequence(sizes or {"ring": 2}, seq_len, mask=mask)
        return raised(ring_attention, q, k, v, seq, **options)

    def same(x: Tensor, seq_len: int = 16) -> str:
        return call(x, x, x, seq_len)

    x = make(1, 8, 4, 8)
    other = torch.distributed.get_rank() == 1
    seq = ShardedSequence(17, groups(ring=2).topology)
    return {
        "3 dimensions": call(x[0], x, x),
        "dtypes": call(x, x.double(), x),
        "integers": call(x.long(), x.long(), x.long()),
        "heads": call(x, make(1, 8, 3, 8), make(1, 8, 3, 8)),
        "kv heads": call(x, make(1, 8, 2, 8), x),
        "head dims": call(x, make(1, 8, 4, 6), x),
        "batches": call(x, make(2, 8, 4, 8), make(2, 8, 4, 8)),
        "whole sequence": call(make(1, 16, 4, 8), x, x),
        "keys": call(x, make(1, 9, 4, 8), make(1, 9, 4, 8)),
        "uneven": raised(ring_attention, x, x, x, seq),
        "sinks": call(x, x, x, sinks=torch.zeros(3)),
        "kernel": call(x, x, x, kernel="fast"),
        "ulysses": call(make(1, 8, 3, 8), make(1, 8, 3, 8), make(1, 8, 3, 8), sizes={"ulysses": 2}),
        "empty": call(make(0, 8, 4, 8), make(0, 8, 4, 8), make(0, 8, 4, 8)),
        "rank 1 dtype": same(x.double() if other else x),
        "rank 1 heads": call(x, x if not other else x[:, :, :3], x if not other else x[:, :, :3]),
        "rank 1 mask": call(x, x, x, mask=masks.documents([0, 8 + other])),
        "rank 1 length": same(make(1, 9, 4, 8) if other else x, seq_len=18 if other else 16),
        "steps": raised(
            ring_attention,
            x,
            x,
            x,
            sequence({"ring": 2}, 16, layout="striped"),
            sequence({"ring": 2}, 16, layout="zigzag"),
        ),
    }


@pytest.mark.parametrize(
    ("name", "message"),
    {
        "3 dimensions": r"q must be \[batch, tokens, heads, head dim\]",
        "dtypes": "one floating-point dtype.*float64",
        "integers": "one floating-point dtype",
        "heads": "3 does not divide 4",
        "kv heads": "k and v must have the same tokens and heads",
        "head dims": "one head dimension",
        "batches": "one batch size",
        "whole sequence": r"q must hold this rank's 8 tokens.*sequence.shard.*\(1, 16, 4, 8\)",
        "keys": "kv_sequence",
        "uneven": "9 tokens",
        "sinks": r"sinks must be \[4\]",
        "kernel": "auto, reference; got 'fast'",
        "ulysses": "2 divides; got 3",
        "empty": "none of them 0",
        "rank 1 dtype": "same call.*float32.*float64",
        "rank 1 heads": "3 does not divide 4",
        "rank 1 mask": "same call.*checksum",
        "rank 1 length": "same call.*18 tokens",
        "steps": "the same layout",
    }.items(),
)
def test_bad_input_is_refused_on_every_rank(
    world: Callable[[int], World], name: str, message: str
) -> None:
    import re

    for answers in refusals(world):
        assert re.search(message, answers[name], re.DOTALL), answers[name] or "no error"


_answers: list[dict[str, str]] = []


def refusals(world: Callable[[int], World]) -> list[dict[str, str]]:
    if not _answers:
        _answers.extend(world(2).run(bad_calls))
    return _answers


def test_dropout_is_refused() -> None:
    x = torch.zeros(1, 8, 2, 4)
    with pytest.raises(NotImplementedError, match=r"dropout_p=0\.1"):
        ring_attention(x, x, x, ShardedSequence(8), dropout_p=0.1)
