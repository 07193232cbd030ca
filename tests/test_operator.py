"""Attention as one operator: to the compiler, and to activation checkpointing."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import World
from ranks import raised, sequence
from ringed import relative, ring_passes
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ring_sp import ShardedSequence, explain, masks, max_logits, ring_attention
from ring_sp.kernels import Call, reference, row_max
from ring_sp.kernels.contract import Rows

Sizes = dict[str, int]
SPREAD: list[tuple[int, Sizes]] = [
    (1, {}),
    (2, {"ring": 2}),
    (2, {"ulysses": 2}),
    (4, {"ring": 2, "ulysses": 2}),
]


def model(seq: ShardedSequence, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    out, lse = ring_attention(q.sin(), k * 2, v, seq, sinks=sinks, softcap=3.0, return_lse=True)
    return out.square().sum() + lse.masked_fill(lse.isinf(), 0).sum()


def tensors(seq: ShardedSequence) -> list[Tensor]:
    """q, k, v and sinks of this rank; fewer key heads than Ulysses peers, and Dv unlike D."""
    shapes = [(1, seq.local_len, 4, 8), (1, seq.local_len, 1, 8), (1, seq.local_len, 1, 6), (4,)]
    return [torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def compiled_against_eager(sizes: Sizes) -> list[float]:
    """For two masks in turn, since a graph must not keep the first: how far value and gradients of
    the compiled model are from the eager one's.
    """
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = []
    for mask in (masks.causal(), masks.documents([0, 5, 14]), masks.causal()):
        seq = sequence(sizes, 21, mask=mask)
        inputs = tensors(seq)
        here, there = (f(seq, *inputs) for f in (compiled, model))
        grads = (torch.autograd.grad(loss, inputs) for loss in (here, there))
        found += [
            relative(a, b) for a, b in zip((here, *next(grads)), (there, *next(grads)), strict=True)
        ]
    return found


@pytest.mark.parametrize(("size", "sizes"), SPREAD, ids=str)
def test_the_compiler_takes_it_whole(
    world: Callable[[int], World], size: int, sizes: Sizes
) -> None:
    for found in world(size).run(compiled_against_eager, sizes):
        assert max(found) < 1e-13


def checked(sizes: Sizes) -> None:
    """torch's own checks of an operator: its schema, its fake results, its gradients' place."""
    seq = sequence(sizes, 21)
    q, k, v, sinks = tensors(seq)
    number, peers = seq.number, seq.topology.ulysses.size
    options = None, 3.0, 0.0, None, "auto", True
    torch.library.opcheck(
        torch.ops.ring_sp.attention.default,
        (q, k, v, sinks, number, number, peers, *options, True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    with torch.no_grad():
        out, lse, kv, *traded = torch.ops.ring_sp.attention(
            q, k, v, sinks, number, number, peers, *options, False
        )
    saved = (q.detach(), kv, out, lse) if peers == 1 else (traded[0], kv, *traded[1:])
    torch.library.opcheck(
        torch.ops.ring_sp.attention_backward.default,
        (torch.ones_like(out), None, *saved, number, number, peers, 1, True, *options),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize(("size", "sizes"), SPREAD, ids=str)
def test_what_it_promises_the_compiler_is_what_it_gives(
    world: Callable[[int], World], size: int, sizes: Sizes
) -> None:
    world(size).run(checked, sizes)


@pytest.mark.parametrize("like_q", [False, True])
def test_results_lie_as_the_compiler_was_promised(
    monkeypatch: pytest.MonkeyPatch, like_q: bool
) -> None:
    """Whichever way a kernel lays them out."""

    def laid_out(found: Tensor, q: Tensor) -> Tensor:
        return (torch.empty_like(q) if like_q else q.new_empty(q.shape)).copy_(found)

    def forward(q: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
        out, lse = attend(q, *given)
        return laid_out(out, q), lse

    def backward(q: Tensor, *given: Any) -> Tensor:
        return laid_out(differentiate(q, *given), q)

    attend, differentiate = reference.forward, reference.backward
    monkeypatch.setattr(reference, "forward", forward)
    monkeypatch.setattr(reference, "backward", backward)
    seq, options = ShardedSequence(16), (None, None, 0.0, None, "auto", False)
    q, k, v = (torch.randn(1, 2, 16, 4).transpose(1, 2).requires_grad_() for _ in range(3))
    call = q, k, v, None, seq.number, seq.number, 1, *options, True
    operators = torch.ops.ring_sp
    faked = ("test_faketensor",)
    torch.library.opcheck(operators.attention.default, call, test_utils=faked)
    out, lse, kv, *_ = (x.detach() for x in operators.attention(*call))
    back = torch.ones_like(out), None, q.detach(), kv, out, lse, seq.number, seq.number, 1, 2, False
    torch.library.opcheck(operators.attention_backward.default, (*back, *options), test_utils=faked)


def passes_of_a_checkpointed_layer(keep: bool) -> tuple[int, float]:
    """Passes round the ring in forward and backward of a checkpointed layer, and how far its
    gradients are from those of the plain one.
    """
    seq = sequence({"ring": 2}, 21)
    inputs = tensors(seq)
    ops = [torch.ops.ring_sp.attention.default] if keep else [torch.ops.aten.mm.default]
    policy = partial(create_selective_checkpoint_contexts, ops)
    wanted = torch.autograd.grad(model(seq, *inputs), inputs)
    with ring_passes() as ring:
        loss = checkpoint(model, seq, *inputs, use_reentrant=False, context_fn=policy)
        found = torch.autograd.grad(loss, inputs)
    return ring.call_count, max(relative(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(("keep", "wanted"), [(True, 2), (False, 3)])
def test_a_checkpoint_that_keeps_it_does_not_go_round_again(
    world: Callable[[int], World], keep: bool, wanted: int
) -> None:
    for count, error in world(2).run(passes_of_a_checkpointed_layer, keep):
        assert count == wanted and error < 1e-14


def test_a_sequence_that_nobody_keeps_outlives_its_backward_only() -> None:
    x = torch.randn(1, 8, 2, 4, requires_grad=True)
    seq = ShardedSequence(8)
    number, out = seq.number, ring_attention(x, x, x, seq)
    del seq
    out.sum().backward()
    del out
    gc.collect()
    with pytest.raises(RuntimeError, match="sequence of this call is gone"):
        torch.ops.ring_sp.attention(
            *(x, x, x, None, number, number, 1),
            *(None, None, 0.0, None, "auto", False, False),
        )


@pytest.mark.parametrize("odd", range(4))
def test_one_tensor_on_meta_is_refused_and_not_answered_with_a_shape(odd: int) -> None:
    given = [torch.randn(1, 8, 2, 4) for _ in range(3)] + [torch.zeros(2)]
    given[odd] = given[odd].to("meta")
    q, k, v, sinks = given
    assert "on meta" in raised(ring_attention, q, k, v, ShardedSequence(8), sinks=sinks)
    assert odd > 1 or "on meta" in raised(max_logits, q, k, ShardedSequence(8))


def test_a_forward_mode_derivative_is_refused_and_not_zero() -> None:
    for odd in range(3):

        def attend(x: Tensor, odd: int = odd) -> Tensor:
            given = [x if at == odd else torch.randn(1, 8, 2, 4) for at in range(3)]
            return ring_attention(given[0], given[1], given[2], ShardedSequence(8))

        x = torch.randn(1, 8, 2, 4)
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.func.jvp(attend, (x,), (x,))


def test_kernels_are_asked_again_in_deterministic_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Call] = []
    monkeypatch.setattr(reference, "refusal", asked.append)
    x, seq = torch.randn(1, 8, 2, 4, requires_grad=True), ShardedSequence(8)
    ring_attention(x, x, x, seq, kernel="reference").sum().backward()
    plain, asked[:] = {call.deterministic for call in asked}, []
    torch.use_deterministic_algorithms(True)
    try:
        out = ring_attention(x, x, x, seq, kernel="reference")
        forward, asked[:] = {call.deterministic for call in asked}, []
        out.sum().backward()
        backward, asked[:] = {call.deterministic for call in asked}, []
        explain(x, x, x, seq, kernel="reference")
        told, asked[:] = {call.deterministic for call in asked}, []
        with torch.no_grad():
            ring_attention(x, x, x, seq, kernel="reference")
    finally:
        torch.use_deterministic_algorithms(False)
    assert (plain, forward, backward, told) == ({False}, {True}, {True}, {True})
    assert {call.deterministic for call in asked} == {False}


def placed(x: Tensor, how: str) -> Tensor:
    """A copy of `x` whose rows are cut from wider ones, or that starts late in its memory."""
    if how == "wider":
        whole = x.new_empty(*x.shape[:3], x.shape[3] + 4)
        return whole[..., 4:].copy_(x)
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


def misplaced(kv_heads: int, how: str) -> bool:
    """Whether a kernel sees a row at no multiple of 16 bytes, or the results are not those of
    tensors as torch makes them.
    """
    seq, seen = sequence({"ring": 2}, 29), list[Tensor]()

    def forward(*given: Any) -> tuple[Tensor, Tensor]:
        seen.extend(given[:3])
        return attend(*given)

    def backward(q: Tensor, kv: tuple[Tensor, Tensor], rows: Rows, *given: Any) -> Tensor:
        seen.extend([q, *kv, rows.dout])
        return differentiate(q, kv, rows, *given)

    def results(*given: Tensor) -> list[Tensor]:
        q, k, v = (x.detach().requires_grad_() for x in given[:3])
        out = ring_attention(q, k, v, seq, kernel="reference")
        return [out, *torch.autograd.grad(out, (q, k, v), given[3])]

    shapes = [(2, seq.local_len, heads, 16) for heads in (4, kv_heads, kv_heads, 4)]
    whole = [torch.randn(*shape).bfloat16() for shape in shapes]
    wanted, attend, differentiate = results(*whole), reference.forward, reference.backward
    with (
        mock.patch.object(reference, "forward", forward),
        mock.patch.object(reference, "backward", backward),
    ):
        found = results(*(placed(x, how) for x in whole))
    at = [place for x in seen for place in (x.data_ptr(), *(2 * n for n in x.stride()[:3]))]
    return any(place % 16 for place in at) or not all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("how", ["wider", "late"])
@pytest.mark.parametrize("kv_heads", [1, 4], ids=["keys travel", "queries travel"])
def test_kernels_get_rows_at_multiples_of_16_bytes(
    world: Callable[[int], World], kv_heads: int, how: str
) -> None:
    """Where libraries load as many at a time, whatever a caller has cut its tensors from."""
    assert not any(world(2).run(misplaced, kv_heads, how))


def test_kernels_run_with_the_device_of_their_tensors_as_the_current_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Triton launches on the current device, wherever tensors are."""
    current, seen = list[Tensor](), []

    @contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        current.append(x)
        yield
        current.pop()

    def watched(stock: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            seen.append(bool(current))
            return stock(*given)

        return call

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for module, name in ((reference, "forward"), (reference, "backward"), (row_max, "fold")):
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    x, seq = torch.randn(1, 8, 2, 4, requires_grad=True), ShardedSequence(8)
    ring_attention(x, x, x, seq, kernel="reference").sum().backward()
    max_logits(x, x, seq)
    assert seen == [True] * 3
