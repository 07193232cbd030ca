from collections.abc import Callable
from dataclasses import replace
from itertools import cycle

import pytest
import torch
from conftest import World
from ranks import groups, sequence
from ringed import Case, Heads, assert_exact, got, inputs, relative
from torch import Tensor
from visibility import cases

from ring_sp import ShardedSequence, layout, masks, ring_attention
from ring_sp.kernels import Call, Kernel, reference, select
from ring_sp.kernels.contract import Rows

MASKS = tuple(cases(24))


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
    (6, {"ring": 3, "ulysses": 2}, (6, 3)),
    (6, {"outer": 2, "ring": 3}, (4, 2)),
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
    lengths, names = cycle([29, 24, 37, max(size, 4)]), cycle(layout.LAYOUTS)
    selfs = [
        Case(mask, name, next(lengths), heads=heads) for mask in MASKS for name in layout.LAYOUTS
    ]
    crosses = [
        Case(mask, next(names), 31, kv_len, heads)
        for mask in ("full", "causal", "window")
        for kv_len in (17, 47)
    ]
    assert_exact(world(size), sizes, selfs + crosses)


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
    q = torch.randn(1, 6, 2, 4, dtype=torch.bfloat16, requires_grad=True)
    out, lse = ring_attention(q, q, q, seq, return_lse=True)
    out.sum().backward()
    assert out.dtype == q.dtype and out.eq(0).all() and lse.eq(-torch.inf).all()
    assert q.grad is not None and q.grad.eq(0).all()


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
    with pytest.raises(NotImplementedError, match="no second derivative"):
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


def test_autocast_does_not_reach_into_the_accumulation() -> None:
    seq = ShardedSequence(40)
    q, k, v = (torch.randn(1, 40, 2, 16, requires_grad=True) for _ in range(3))
    plain = ring_attention(q, k, v, seq)
    wanted = torch.autograd.grad(plain.square().sum(), (q, k, v))
    with torch.autocast("cpu", torch.bfloat16):
        out = ring_attention(q, k, v, seq)
        grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip((out, *grads), (plain, *wanted), strict=True))


def test_a_compiled_function_may_call_it(world: Callable[[int], World]) -> None:
    assert max(world(2).run(compiled_against_eager)) < 1e-14


def compiled_against_eager() -> float:
    def model(q: Tensor, k: Tensor, v: Tensor, seq: ShardedSequence) -> Tensor:
        return ring_attention(q.sin(), k * 2, v, seq).square()

    seq = sequence({"ring": 2}, 13)
    parts = [torch.randn(1, seq.local_len, 2, 4, dtype=torch.float64) for _ in range(3)]
    q, k, v = (part.requires_grad_() for part in parts)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    (here,) = torch.autograd.grad(compiled(q, k, v, seq).sum(), k)
    (there,) = torch.autograd.grad(model(q, k, v, seq).sum(), k)
    return relative(here, there)


@pytest.mark.parametrize("options", [{"softcap": -1.5}, {"softcap": 0.0}, {"scale": float("nan")}])
def test_scores_without_a_meaning_are_refused(options: dict[str, float]) -> None:
    x = torch.zeros(1, 8, 2, 4)
    with pytest.raises(ValueError, match="must be None or a finite number"):
        ring_attention(x, x, x, ShardedSequence(8), **options)  # type: ignore[call-overload]


def test_no_sink_for_a_query_that_sees_nothing_gives_zeros() -> None:
    x = torch.randn(1, 6, 2, 4)
    seq = ShardedSequence(6, mask=masks.documents([0, 4]))
    out = ring_attention(x, x, x, seq, sinks=torch.full((2,), -torch.inf))
    assert out.isfinite().all() and out[:, 4:].eq(0).all()


def test_kernels_get_tensors_that_are_dense_in_their_last_dimension(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Tensor] = []

    def watched(stock: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            seen.extend(x for x in args if isinstance(x, Tensor))
            seen.extend(x.dout for x in args if isinstance(x, Rows))
            return stock(*args)

        return call

    for name in ("forward", "backward"):
        monkeypatch.setattr(reference, name, watched(getattr(reference, name)))
    q, k, v = (torch.randn(1, 8, 4, 2).mT.contiguous().mT.requires_grad_() for _ in range(3))
    out = ring_attention(q, k, v, ShardedSequence(8))
    out.backward(torch.randn(1, 8, 4, 2).mT.contiguous().mT)
    assert len(seen) >= 5 and all(x.stride(3) == 1 for x in seen)


def test_a_kernel_is_told_what_it_must_know_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def choose(name: str, call: Call) -> Kernel:
        told.append(call)
        return select(name, call)

    monkeypatch.setattr("ring_sp.fit.select", choose)
    q, k = torch.randn(1, 24, 4, 8, requires_grad=True), torch.randn(1, 24, 2, 8)
    v, sinks = torch.randn(1, 24, 2, 16), torch.zeros(4)
    plain = ShardedSequence(24, mask=masks.full())
    packed = ShardedSequence(24, mask=masks.documents([0, 9, 24], masks.sliding_window(2)))
    ring_attention(q, k, v, plain, scale=0.5)
    ring_attention(q, q, q, packed, softcap=2.0)
    ring_attention(q, k, v, plain, return_lse=True)
    ring_attention(q, k, v, plain, sinks=sinks)
    call = Call("cpu", torch.float32, 8, 16, scale=0.5)
    with_lse = replace(call, scale=8**-0.5, lse_gradient=True)
    windowed = Call(
        "cpu", torch.float32, 8, 8, softcap=True, scale=8**-0.5, windowed=True, num_regions=2
    )
    assert told == [call, windowed, with_lse, with_lse]
