"""Checkpoints that do not go round the ring again."""

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import World
from ranks import groups, raised, sequence
from ringed import relative, ring_passes
from test_operator import SPREAD, Sizes, model, tensors
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from ring_sp import (
    AttentionConfig,
    Checkpointing,
    RingTransformer,
    attention_kept,
    checkpoint,
)
from ring_sp.loss import shift_labels

DEPTH = 3
OPTIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "nothing": (0, {}),
    "full": (DEPTH, {"checkpointing": Checkpointing(keep_attention=False)}),
    "kept": (0, {"checkpointing": Checkpointing()}),
    "two layers": (0, {"checkpointing": Checkpointing(every=2)}),
    "chunks": (0, {"checkpointing": Checkpointing(), "feed_forward_chunk": 3, "loss_chunk": 4}),
    "chunks alone": (0, {"feed_forward_chunk": 4}),
}
"""Passes round the ring that are made again, and arguments."""


def transformer(sizes: Sizes, saving: dict[str, Any]) -> RingTransformer:
    torch.manual_seed(1)
    config = AttentionConfig(16, 4, num_kv_heads=2)
    return RingTransformer(17, DEPTH, config, topology=groups(**sizes).topology, **saving).double()


def loss_and_gradients(module: RingTransformer) -> list[Tensor]:
    tokens = torch.randint(17, (2, 29), generator=torch.Generator().manual_seed(2))
    loss = module(tokens, shift_labels(tokens))
    return [loss.detach(), *torch.autograd.grad(loss, list(module.parameters()))]


def passes_and_error(sizes: Sizes, saving: dict[str, Any]) -> tuple[int, float]:
    wanted = loss_and_gradients(transformer(sizes, {}))
    with ring_passes() as ring:
        found = loss_and_gradients(transformer(sizes, saving))
    return ring.call_count, max(relative(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("size", "sizes"), [*SPREAD, (3, {"ring": 3})], ids=str)
def test_a_transformer_that_saves_gives_the_same(
    world: Callable[[int], World], size: int, sizes: Sizes, name: str
) -> None:
    again, saving = OPTIONS[name]
    for count, error in world(size).run(passes_and_error, sizes, saving):
        assert count == 2 * DEPTH + again and error < 1e-12


def test_saving_leaves_the_state_dict_as_it_is() -> None:
    plain, saving = (transformer({}, OPTIONS[name][1]) for name in ("nothing", "chunks"))
    assert {n: x.shape for n, x in plain.state_dict().items()} == {
        n: x.shape for n, x in saving.state_dict().items()
    }


def named(seq: Any, q: Tensor, *, k: Tensor, v: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    dropped = torch.nn.functional.dropout(q, 0.5)
    return model(seq, dropped, k, v, sinks), dropped


def test_it_takes_names_gives_tuples_and_draws_the_same_again() -> None:
    seq = sequence({}, 21)
    q, k, v, sinks = tensors(seq)

    def taken(f: Callable[..., Any]) -> list[Tensor]:
        torch.manual_seed(0)
        loss, dropped = f(seq, q, k=k, v=v, sinks=sinks)
        return list(torch.autograd.grad(loss + dropped.sum(), [q, k, v, sinks]))

    for kept in (True, False):
        saved = taken(partial(checkpoint, named, keep_attention=kept))
        assert max(map(relative, saved, taken(named))) < 1e-14


def test_autocast_is_that_of_the_first_run() -> None:
    layer, x = torch.nn.Linear(6, 6), torch.randn(4, 6)
    seen: list[torch.dtype] = []

    def run(x: Tensor) -> Tensor:
        seen.append(layer(x).dtype)
        return layer(x).square()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = checkpoint(run, x)
    out.sum().backward()
    assert seen == [torch.bfloat16] * 2


def test_without_gradients_nothing_is_kept() -> None:
    seq, stretch = sequence({}, 8), mock.Mock(wraps=model)
    with torch.no_grad(), mock.patch("ring_sp.checkpointing.Kept") as kept:
        checkpoint(stretch, seq, *tensors(seq))
    assert not kept.called


@pytest.mark.parametrize("keep", [True, False])
def test_the_compiler_takes_it_whole(world: Callable[[int], World], keep: bool) -> None:
    for count, error in world(2).run(compiled, keep):
        assert count == (2 if keep else 3) and error < 1e-13


def compiled(keep: bool) -> tuple[int, float]:
    torch._dynamo.reset()
    seq = sequence({"ring": 2}, 21)
    inputs = tensors(seq)
    wanted = torch.autograd.grad(model(seq, *inputs), inputs)
    saved = partial(checkpoint, model, keep_attention=keep)
    run = torch.compile(saved, backend="aot_eager", fullgraph=True)
    with ring_passes() as ring:
        found = torch.autograd.grad(run(seq, *inputs), inputs)
    return ring.call_count, max(relative(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("compiled", [False, True])
def test_torchs_own_checkpoint_takes_what_was_kept_each_time(
    world: Callable[[int], World], compiled: bool
) -> None:
    for count, error in world(2).run(kept_by_torch, compiled):
        # A forward and two backwards.
        assert count == 3 and error < 1e-13


def kept_by_torch(compiled: bool) -> tuple[int, float]:
    torch._dynamo.reset()
    seq = sequence({"ring": 2}, 21)
    inputs = tensors(seq)
    wanted = torch.autograd.grad(model(seq, *inputs), inputs)
    run: Callable[..., Any] = partial(
        torch_checkpoint, model, use_reentrant=False, context_fn=attention_kept
    )
    if compiled:
        run = torch.compile(run, backend="aot_eager", fullgraph=True)
    with ring_passes() as ring:
        loss = run(seq, *inputs)
        found = [torch.autograd.grad(loss, inputs, retain_graph=True) for _ in range(2)]
    assert all(map(torch.equal, *found))
    return ring.call_count, max(relative(a, b) for a, b in zip(found[0], wanted, strict=True))


def test_who_traces_gets_a_policy_even_if_torch_says_that_nothing_is_compiled() -> None:
    """As torch before 2.13 does when it asks."""
    asked: list[Any] = []

    def traced(x: Tensor) -> Tensor:
        asked.extend(attention_kept())
        return x.clone()

    assert not torch.compiler.is_compiling()
    make_fx(traced)(torch.zeros(1))
    assert len(asked) == 2 and all(isinstance(each, TorchDispatchMode) for each in asked)


@pytest.mark.parametrize(
    ("saving", "need"),
    [
        ({"feed_forward_chunk": 0}, "at least 1"),
        ({"loss_chunk": 0}, "at least 1; got 0"),
        ({"feed_forward_chunk": 2.5}, "must be a whole number; got 2.5"),
        ({"loss_chunk": "4"}, "must be a whole number; got '4'"),
        ({"checkpointing": True}, "must be a Checkpointing; got True"),
    ],
)
def test_bad_savings_are_refused(saving: dict[str, Any], need: str) -> None:
    assert need in raised(transformer, {}, saving)
    assert "at least 1; got 0" in raised(Checkpointing, 0)
    assert "every must be a whole number; got 2.0" in raised(Checkpointing, 2.0)
    for flags in ({"offload": "false"}, {"keep_attention": "no"}):
        assert "must be True or False" in raised(Checkpointing, **flags)
