"""The ring by Megatron's `--spec`, in what Megatron's own builder makes of it."""

import typing
import warnings
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import World

pytest.importorskip("megatron")
if find_spec("megatron.training") is None:
    pytest.skip("megatron-core has megatron.training from 0.17 on", allow_module_level=True)
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.spec_utils import import_module
from megatron_gpt import (
    LAYERS,
    MOE,
    MTP,
    SEQ_LEN,
    VOCAB,
    Case,
    alone,
    batch,
    case,
    config,
    drawn,
    start,
)
from megatron_on_cpu import OnCpu
from megatron_oracle import Result, distances, step, stock, tagged
from ranks import raised
from ringed import relative, ring_passes
from test_megatron_recomputation import forward, remembering
from test_megatron_training import FULL, SELECTIVE

from ring_sp.integrations.megatron import MegatronRing

LOCAL = {"transformer_impl": "local"}
SPEC = ["ring_sp.integrations.megatron.layer_spec", "ring_layer_spec"]


def newer_typing() -> Any:
    """What megatron.training uses of Python 3.12: one decorator."""
    return mock.patch.object(typing, "override", lambda method: method, create=True)


def built(given: Case) -> GPTModel:
    """What Megatron's training loop builds for `--spec`."""
    with newer_typing():
        from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
    asked = GPTModelConfig(
        transformer=config(given),
        transformer_layer_spec=import_module(SPEC),
        vocab_size=VOCAB,
        seq_length=SEQ_LEN,
        share_embeddings_and_output_weights=False,
        position_embedding_type=given.positions,
    )
    with OnCpu():
        return GPTModelBuilder(asked).build_model(ProcessGroupCollection.use_mpu_process_groups())


def errors(given: Case, whole: Result) -> list[tuple[float, str]]:
    """How far this rank's logits and the summed gradients are from those of one rank."""
    start(given)
    model = drawn(built(given).double(), given.tensor)
    ring = MegatronRing.from_group(parallel_state.get_context_parallel_group())
    place = ring.sequence(SEQ_LEN)
    tokens, cotangent = (place.shard(x) for x in batch(given, 0))
    counted = torch.ones(1, place.local_len, dtype=torch.bool)
    with OnCpu():
        logits, gradients = step(given, model, tokens, cotangent, place.positions(), counted, None)
    column = parallel_state.get_tensor_model_parallel_rank()
    expected = place.shard(whole[0]).chunk(given.tensor, -1)[column]
    summed = distances(given, gradients, [whole], tagged(model))
    return sorted([(relative(logits, expected), "logits"), *summed], reverse=True)


@pytest.mark.parametrize(
    ("size", "given"),
    [
        (1, case(config=LOCAL)),
        (2, case(ring=2, config=LOCAL)),
        (4, case(ring=4, config={**LOCAL, "qk_layernorm": True})),
        (4, case(tensor=2, ring=2, config={**LOCAL, "sequence_parallel": True})),
        (2, case(ring=2, config={**LOCAL, **MOE})),
    ],
    ids=str,
)
def test_a_model_by_spec_equals_stock_megatron_on_one_rank(
    world: Callable[[int], World], size: int, given: Case
) -> None:
    (whole,) = world(1).run(stock, given, 0)
    for worst, *_ in world(size).run(errors, given, whole):
        assert worst[0] < 1e-11, worst


def refused(given: Case, **args: bool) -> str:
    start(given)
    with newer_typing():
        from megatron.training import global_vars
    with mock.patch.object(global_vars, "_GLOBAL_ARGS", Namespace(**args) if args else None):
        return raised(built, given)


def test_layers_that_a_spec_does_not_reach_are_refused(world: Callable[[int], World]) -> None:
    (said,) = world(1).run(refused, case(config={**LOCAL, **MTP}))
    assert "--spec does not reach" in said and "--sequence-parallel-ring" in said


def test_documents_that_are_cut_otherwise_than_turned_are_refused(
    world: Callable[[int], World],
) -> None:
    asked = {"dataloader_inter_document_masking": True}
    given = case(ring=2, config=LOCAL)
    for said in world(2).run(partial(refused, given, **asked, sft=False)):
        assert "in place of --spec" in said
    assert world(2).run(partial(refused, given, **asked, sft=True)) == ["", ""]
    assert world(1).run(partial(refused, alone(given), **asked, sft=False)) == [""]


def rounds_of_two_steps(given: Case) -> list[int]:
    """How often two micro-batches go round the ring."""
    start(given)
    get_cuda_rng_tracker().reset()
    model = drawn(built(given).double(), given.tensor)
    ring = MegatronRing.from_group(parallel_state.get_context_parallel_group())
    found = []
    with remembering(), OnCpu():
        for seed in (1, 2):
            with ring_passes() as rounds:
                forward(model, ring, seed).backward()
            found.append(rounds.call_count)
    return found


@pytest.mark.parametrize("config", [FULL, SELECTIVE], ids=["full", "core_attn"])
def test_attention_is_kept_but_for_the_very_first_call(
    world: Callable[[int], World], config: dict[str, Any]
) -> None:
    for first, second in world(2).run(
        rounds_of_two_steps, case(ring=2, config={**LOCAL, **config})
    ):
        assert (first, second) == (2 * LAYERS + 1, 2 * LAYERS)


def warned(per_token: bool) -> list[str]:
    given = case(ring=2, config={**LOCAL, "calculate_per_token_loss": per_token})
    start(given)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        built(given)
    return [str(each.message) for each in caught if "per-token" in str(each.message)]


def test_a_loss_that_is_not_that_of_one_rank_is_warned_of(world: Callable[[int], World]) -> None:
    assert world(2).run(warned, True) == [[], []]
    for (said,) in world(2).run(warned, False):
        assert "not those of one rank" in said
