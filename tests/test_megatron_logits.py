"""Megatron's qk-clip and its logging of attention logits over rings."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import World

pytest.importorskip("megatron")
from megatron.core import parallel_state
from megatron.core.optimizer.qk_clip import clip_qk
from megatron_gpt import MLA, batch, built, case, start
from megatron_gpt import SEQ_LEN as GPT_LEN
from megatron_on_cpu import OnCpu
from test_megatron_training import FULL, MICRO, SELECTIVE, SEQ_LEN, STEPS, Options, build, train
from torch import Tensor

from ring_sp.integrations.megatron import RingCoreAttention, core_attention, install

LAYERS = 4
CLIP = {"qk_clip": True, "qk_clip_threshold": 2.0, "window_size": (9, 0)}


def layers(chunks: list[Any]) -> list[Any]:
    return [layer for chunk in chunks for layer in chunk.module.decoder.layers]


def clipped(chunks: list[Any]) -> list[float]:
    """The largest score of each head of the whole model, and the sums of the weights that Megatron
    clips by them.
    """
    told: list[float] = []
    group = parallel_state.get_tensor_model_parallel_group()
    for layer in layers(chunks):
        largest = layer.self_attention.core_attention.current_max_attn_logits.clone()
        assert largest.dtype == torch.float32 and not largest.requires_grad
        dist.all_reduce(largest, dist.ReduceOp.MAX, parallel_state.get_data_parallel_group(True))
        heads = [torch.empty_like(largest) for _ in range(group.size())]
        dist.all_gather(heads, largest, group)
        told += torch.cat(heads).tolist()
    config = layers(chunks)[0].config
    # Megatron finds the layers through the wrapper of its half-precision models.
    wrapped = [SimpleNamespace(module=chunk) for chunk in chunks]
    largest = torch.tensor(clip_qk(wrapped, log_max_only=not config.qk_clip))
    # Megatron logs that of the heads of one tensor rank.
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    told.append(largest.item())
    for layer in layers(chunks):
        weight = layer.self_attention.linear_qkv.weight.detach().square().sum()
        dist.all_reduce(weight, group=group)
        told.append(weight.item())
        if config.qk_clip:
            assert layer.self_attention.core_attention.current_max_attn_logits is None
    return told


def run(options: Options) -> tuple[list[float], int]:
    """What training says, and how often keys went round for the largest scores."""
    with OnCpu():
        chunks, optimizer, ring = build(options)
    counted = mock.Mock(wraps=core_attention.max_logits)
    with mock.patch.object(core_attention, "max_logits", counted):
        told = train(chunks, optimizer, ring, clipped)
    return told, counted.call_count


def brute(core: Any, given: tuple[Tensor, ...], _: object) -> None:
    """Remember the largest scores of stock Megatron's layout, [s, b, h, d], unsharded."""
    q, k = given[0].detach(), given[1].detach().repeat_interleave(2, 2)
    position = torch.arange(len(q))
    offset = position[:, None] - position
    hidden = (offset < 0) | (offset > 9)
    scores = torch.einsum("qbhd,kbhd->bhqk", q, k) * q.shape[3] ** -0.5
    core.seen.append(scores.masked_fill(hidden, -torch.inf).amax((0, 2, 3)))


def alone() -> list[bool]:
    """Whether a step's largest scores are those of all its micro-batches, on one rank, and those of
    an evaluation are left out.
    """
    with OnCpu():
        chunks, optimizer, ring = build({"config": CLIP})
    cores: list[Any] = [x for x in chunks[0].modules() if isinstance(x, RingCoreAttention)]
    for core in cores:
        core.seen = []
        core.register_forward_hook(brute)
    answers: list[bool] = []

    def look(chunks: list[Any]) -> list[float]:
        for core in cores:
            true = torch.stack(core.seen).amax(0)
            assert len(core.seen) == MICRO
            answers.append(torch.allclose(core.current_max_attn_logits, true, rtol=1e-5))
            core.seen = []
        return clipped(chunks)

    train(chunks, optimizer, ring, look)
    q, kv = torch.ones(SEQ_LEN, 1, 4, 8), torch.ones(SEQ_LEN, 1, 2, 8)
    cores[0].eval()(q, kv, kv, None)
    return [*answers, cores[0].current_max_attn_logits is None]


def test_the_largest_scores_are_those_of_the_whole_step(world: Callable[[int], World]) -> None:
    assert world(1).run(alone) == [[True] * (LAYERS * STEPS + 1)]


@pytest.mark.parametrize("config", [CLIP, {"log_max_attention_logit": True}], ids=str)
def test_clips_and_logs_as_one_rank_does(
    world: Callable[[int], World], config: dict[str, Any]
) -> None:
    ((wanted, _),) = world(1).run(run, {"config": config})
    runs: list[tuple[int, Options]] = [
        (2, {"ring": 2, "config": {**config, **SELECTIVE}}),
        (2, {"ring": 2, "config": {**config, **FULL}, "layout": "striped"}),
        (4, {"ring": 4, "sharded": True, "config": config}),
    ]
    if "qk_clip" not in config:  # Megatron's own clips wrong shapes with more than one tensor rank.
        runs.append((4, {"ring": 2, "tensor": 2, "config": config}))
    for size, options in runs:
        for told, counted in world(size).run(run, options):
            assert told == pytest.approx(wanted, rel=1e-4)
            assert counted == LAYERS * MICRO * STEPS, "none in recomputation"
    if "qk_clip" in config:
        ((unclipped, _),) = world(1).run(run, {"config": {**config, "qk_clip_threshold": 1e3}})
        assert wanted[-LAYERS:] != pytest.approx(unclipped[-LAYERS:], rel=1e-3)


def latent(ring: int) -> list[float]:
    """The largest scores of multi-latent attention, and what is left of the weights they clip."""
    given = case(ring=ring, config={**MLA, "qk_clip": True, "qk_clip_threshold": 0.1})
    start(given)
    made = install(given.options)
    try:
        model = built(given)
    finally:
        made.remove()
    sequence = made.built_ring().sequence(GPT_LEN)
    tokens = sequence.shard(batch(given, 0)[0])
    with OnCpu():
        model(tokens, sequence.positions().expand_as(tokens), None)
    largest = clip_qk([SimpleNamespace(module=SimpleNamespace(module=model))])
    weights = [weight.detach().square().sum().item() for weight in model.parameters()]
    return [largest, *weights]


def test_clips_multi_latent_attention(world: Callable[[int], World]) -> None:
    (wanted,) = world(1).run(latent, 1)
    assert wanted[0] > 0.2
    for told in world(2).run(latent, 2):
        assert told == pytest.approx(wanted, rel=1e-6)
