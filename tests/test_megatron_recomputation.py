"""Attention kept across Megatron's recomputation: as often round the ring as without it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import World

pytest.importorskip("megatron")
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker, get_cuda_rng_tracker
from megatron_gpt import LAYERS, MLA, MOE, MTP, SEQ_LEN, VOCAB, Case, built, case, grads, start
from megatron_on_cpu import OnCpu
from ranks import raised
from ringed import relative, ring_passes
from test_megatron_training import FULL, MICRO, SELECTIVE, STEPS, Options, build, train
from torch import Tensor

from ring_sp.integrations.megatron import MegatronRing, install

ONE = FULL
ALL = {**ONE, "recompute_num_layers": 2}
BLOCK = {**ONE, "recompute_method": "block"}
CORE = SELECTIVE
SHARED = {**ONE, "distribute_saved_activations": True}
DROPOUT = {"attention_dropout": 0.3, "hidden_dropout": 0.2}


@contextmanager
def remembering() -> Iterator[None]:
    """The tracker of machines without a GPU forgets what it is given; here it does not."""
    tracker = get_cuda_rng_tracker()
    really = partial(CudaRNGStatesTracker.set_states, tracker)
    with mock.patch.object(tracker, "set_states", really):
        yield


def model_of(given: Case, keep: bool = True) -> tuple[Any, MegatronRing]:
    start(given)
    get_cuda_rng_tracker().reset()
    made = install(replace(given.options, keep_attention=keep))
    try:
        return built(given), made.built_ring()
    finally:
        made.remove()


def forward(model: Any, ring: MegatronRing, seed: int) -> Tensor:
    """Logits of a micro-batch under random cotangents; losses with multi-token prediction."""
    make = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (2, SEQ_LEN), generator=make)
    cotangent = torch.randn(2, SEQ_LEN, VOCAB, generator=make, dtype=torch.float64)
    sequence = ring.sequence(SEQ_LEN)
    tokens, cotangent = sequence.shard(tokens), sequence.shard(cotangent)
    extra = {}
    if model.config.mtp_num_layers:
        extra = {"labels": tokens, "loss_mask": torch.ones_like(tokens, dtype=torch.float64)}
    out = model(tokens, sequence.positions().expand_as(tokens), None, **extra)
    return (out * (cotangent[..., 0] if extra else cotangent[..., : out.shape[-1]])).sum()


def two_in_flight(given: Case, order: tuple[int, int], keep: bool = True) -> tuple[Any, int, int]:
    """Gradients of two micro-batches, passes round the ring, and what is held at the end."""
    model, ring = model_of(given, keep)
    torch.manual_seed(7)
    counted = ring_passes()
    with remembering(), OnCpu(), counted as rounds:
        losses = [forward(model, ring, seed) for seed in (1, 2)]
        ring.sequence.cache_clear()  # As batches of many masks do.
        for number in order:
            losses[number].backward()
    return grads(model), rounds.call_count, len(ring.kept)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["in turn", "the last first"])
@pytest.mark.parametrize(
    ("size", "given", "config"),
    [
        (2, case(ring=2), ONE),
        (2, case(ring=2, layout="striped"), ALL),
        (2, case(ring=2), BLOCK),
        (2, case(ring=2), CORE),
        (4, case(ring=4, ulysses=2), ONE),
        (4, case(tensor=2, ring=2, config={"sequence_parallel": True}), ONE),
        (4, case(tensor=2, ring=2), SHARED),
        (2, case(ring=2, config=DROPOUT), ALL),
        (2, case(ring=2, config=DROPOUT), CORE),
        (2, case(ring=2, config={"softmax_type": "learnable", "window_size": (9, 0)}), ONE),
        (2, case(ring=2, config={"qk_clip": True}), ALL),
        (2, case(ring=2, config=MLA), ONE),
        (2, case(ring=2, config=MOE), ONE),
    ],
    ids=str,
)
def test_recomputation_goes_round_the_ring_no_more_than_none(
    world: Callable[[int], World],
    size: int,
    given: Case,
    config: dict[str, Any],
    order: tuple[int, int],
) -> None:
    recomputed = replace(given, config=(*given.config, *config.items()))
    plain = world(size).run(two_in_flight, given, order)
    kept = world(size).run(two_in_flight, recomputed, order)
    for (wanted, rounds, _), (got, again, held) in zip(plain, kept, strict=True):
        assert (again, held) == (rounds, 0) and rounds >= 4 * LAYERS
        assert max(relative(got[name], grad) for name, grad in wanted.items()) < 1e-11


def test_the_switch_leaves_it_to_the_ring(world: Callable[[int], World]) -> None:
    for config, calls in ((ONE, LAYERS), (BLOCK, 1), (CORE, LAYERS)):
        given = case(ring=2, config=config)
        kept, off = (world(2).run(two_in_flight, given, (0, 1), keep) for keep in (True, False))
        for (_, rounds, _), (_, more, held) in zip(kept, off, strict=True):
            assert (more, held) == (rounds + 2 * calls, 0)


def test_multi_token_prediction_is_kept_too(world: Callable[[int], World]) -> None:
    wanted, got = (
        world(2).run(two_in_flight, case(ring=2, config={**MTP, **config}), (0, 1))
        for config in ({}, ONE)
    )
    for (grads_, rounds, _), (found, again, held) in zip(wanted, got, strict=True):
        assert (again, held) == (rounds, 0) and rounds == 4 * (LAYERS + 1)
        assert max(relative(found[name], grad) for name, grad in grads_.items()) < 1e-6


def fail(*_: object) -> None:
    raise ValueError("broken")


def fates() -> dict[str, int]:
    """How many results are held after forwards of two layers, by what becomes of them."""
    model, ring = model_of(case(ring=2, config=ONE))
    held = {}
    with remembering(), OnCpu():
        loss = forward(model, ring, 1)
        held["before its backward"] = len(ring.kept)
        loss.backward()
        held["after it"] = len(ring.kept)
        with torch.no_grad():
            for _ in range(3):
                forward(model, ring, 1)
            held["without gradients"] = len(ring.kept)
            model.eval()
            forward(model, ring, 1)
        held["evaluation"] = len(ring.kept)
        forward(model, ring, 2).backward()
        held["evaluation with gradients"] = len(ring.kept)
        model.train()
        failing = model.output_layer.register_forward_pre_hook(fail)
        assert [raised(forward, model, ring, 1) for _ in range(2)] == ["broken"] * 2
        failing.remove()
        held["an error, twice"] = len(ring.kept)
        loss = forward(model, ring, 3)
        held["the next"] = len(ring.kept)
        loss.backward()
    model, ring = model_of(case(ring=2, config=BLOCK))
    with remembering(), OnCpu():
        loss = forward(model, ring, 1)
    held["one layer recomputed"] = len(ring.kept)
    loss.detach_()
    return held


def test_what_no_backward_asks_for_is_let_go(world: Callable[[int], World]) -> None:
    for held in world(2).run(fates):
        assert held == {
            "before its backward": LAYERS,
            "after it": 0,
            "without gradients": 1,
            "evaluation": 0,
            "evaluation with gradients": 0,
            "an error, twice": LAYERS,
            "the next": LAYERS,
            "one layer recomputed": 1,
        }


def strays(config: dict[str, Any]) -> tuple[list[dict[str, Tensor]], int]:
    """Gradients where random numbers are put back for a second forward, as where two views get the
    same dropout; of a graph that is gone through twice; and of a checkpoint in another, with its
    passes round the ring.
    """
    found = []
    model, ring = model_of(case(ring=2, config=config))

    def told() -> None:
        found.append({name: grad.clone() for name, grad in grads(model).items()})
        model.zero_grad()

    def outer(seed: Tensor, one: Tensor) -> Tensor:
        return forward(model, ring, int(seed)) * one

    with remembering(), OnCpu():
        forward(model, ring, 9).backward()
        told()
        tracker = get_cuda_rng_tracker()
        before = tracker.get_states()
        first = forward(model, ring, 1)
        tracker.set_states(before)
        (first + forward(model, ring, 2)).backward()
        told()
        both = forward(model, ring, 3), forward(model, ring, 4)
        for _ in range(2):
            both[0].backward(retain_graph=True)
        both[1].backward()
        told()
        one = torch.ones((), dtype=torch.float64, requires_grad=True)
        recomputes = model.config.recompute_granularity is not None
        run = tensor_parallel.checkpoint if recomputes else lambda f, _, *x: f(*x)
        with ring_passes() as rounds:
            nested = [run(outer, False, torch.tensor(seed), one) for seed in (5, 6)]
            for loss in nested:
                loss.backward()
        told()
    return found, rounds.call_count


@pytest.mark.parametrize("config", [{}, {"attention_dropout": 0.3}], ids=str)
def test_no_forward_gets_the_results_of_another(
    world: Callable[[int], World], config: dict[str, Any]
) -> None:
    plain, kept = (world(2).run(strays, {**config, **full}) for full in ({}, ALL))
    for (wanted, rounds), (found, again) in zip(plain, kept, strict=True):
        assert again == rounds == 4 * LAYERS
        for way, (expected, got) in enumerate(zip(wanted, found, strict=True)):
            for name, grad in expected.items():
                assert relative(got[name], grad) < 1e-11, (way, name)


def scheduled(options: Options) -> tuple[list[float], int]:
    with OnCpu():
        chunks, optimizer, ring = build(options)
    counted = ring_passes()
    with remembering(), counted as rounds:
        told = train(chunks, optimizer, ring)
    assert len(ring.kept) == 0
    return told, rounds.call_count


@pytest.mark.parametrize("config", [ONE, CORE], ids=["full", "core_attn"])
@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, {"ring": 2, "sharded": True}),
        (4, {"ring": 2, "pipeline": 2}),
        (4, {"ring": 2, "pipeline": 2, "virtual": 2}),
        (4, {"ring": 2, "tensor": 2, "sharded": True}),
    ],
    ids=str,
)
def test_training_in_schedules_goes_round_as_often_as_without_recomputation(
    world: Callable[[int], World], size: int, options: Options, config: dict[str, Any]
) -> None:
    plain = world(size).run(scheduled, options)
    kept = world(size).run(scheduled, {**options, "config": config})
    for (wanted, rounds), (told, again) in zip(plain, kept, strict=True):
        assert told == pytest.approx(wanted, rel=2e-6)
        assert again == rounds == 2 * 4 // options.get("pipeline", 1) * MICRO * STEPS
