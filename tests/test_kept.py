"""Attention's results kept across recomputation."""

from collections.abc import Callable

import pytest
import torch
from conftest import World
from ranks import sequence
from ringed import relative, ring_passes
from test_operator import SPREAD, Sizes, model, tensors
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ring_sp import ShardedSequence, ring_attention
from ring_sp.kept import Kept


def twice(kept: Kept, f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`f`, keeping first and replaying after."""

    def run(*args: object) -> Tensor:
        with kept.replaying() if kept.recorded else kept.recording():
            return f(*args)

    return run


def two_layers(seq: ShardedSequence, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    return model(seq, q, k, v, sinks) + model(seq, k.expand_as(q) * q, k, v, sinks)


def nested(seq: ShardedSequence, *inputs: Tensor) -> Tensor:
    inner = twice(Kept(), model)
    own = model(seq, *inputs)
    return own + checkpoint(inner, seq, *(x * 2 for x in inputs), use_reentrant=False)


def passes_and_error(sizes: Sizes, f: Callable[..., Tensor], reentrant: bool) -> tuple[int, float]:
    """Passes round the ring in forward and backward of a checkpoint that keeps, and how far its
    gradients are from those of the plain stretch.
    """
    seq = sequence(sizes, 21)
    inputs = tensors(seq)
    wanted = torch.autograd.grad(f(seq, *inputs), inputs)
    with ring_passes() as ring:
        loss = checkpoint(twice(Kept(), f), seq, *inputs, use_reentrant=reentrant)
        loss.backward()
    pairs = zip(inputs, wanted, strict=True)
    errors = [relative(x.grad, grad) for x, grad in pairs if x.grad is not None]
    assert len(errors) == len(inputs)
    return ring.call_count, max(errors)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
@pytest.mark.parametrize("f", [two_layers, nested])
@pytest.mark.parametrize(("size", "sizes"), SPREAD, ids=str)
def test_recomputation_takes_what_was_kept(
    world: Callable[[int], World],
    size: int,
    sizes: Sizes,
    f: Callable[..., Tensor],
    reentrant: bool,
) -> None:
    for count, error in world(size).run(passes_and_error, sizes, f, reentrant):
        assert count == 4 and error < 1e-13


def test_another_call_than_the_first_is_refused() -> None:
    x, seq, kept = torch.randn(1, 8, 2, 4), ShardedSequence(8), Kept()
    with kept.recording():
        ring_attention(x, x, x, seq)
    with kept.replaying(), pytest.raises(RuntimeError, match="must make the calls"):
        ring_attention(x, x, x, seq, scale=1.0)
    with kept.replaying():
        ring_attention(x, x, x, seq)
        with pytest.raises(RuntimeError, match="now"):
            ring_attention(x, x, x, seq)


def test_a_stretch_may_make_its_sequence_anew() -> None:
    inputs = tensors(sequence({}, 8))

    def stretch(*inputs: Tensor) -> Tensor:
        return model(ShardedSequence(8), *inputs)

    run = twice(Kept(), stretch)
    found = torch.autograd.grad(checkpoint(run, *inputs, use_reentrant=False), inputs)
    wanted = torch.autograd.grad(stretch(*inputs), inputs)
    assert max(map(relative, found, wanted)) < 1e-14


def test_it_ends_with_the_stretch() -> None:
    x, seq, kept = torch.randn(1, 8, 2, 4), ShardedSequence(8), Kept()
    with kept.recording():
        out = ring_attention(x, x, x, seq)
    assert not torch.equal(ring_attention(2 * x, x, x, seq), out)
    with kept.replaying():
        assert torch.equal(ring_attention(2 * x, x, x, seq), out)
