"""What of a Megatron config is refused before anything is built."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import World

pytest.importorskip("megatron")
from megatron.core import parallel_state
from megatron.core.extensions import transformer_engine
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron_gpt import SEQ_LEN, Case, built, case, start
from ranks import raised

from ring_sp.integrations.megatron import (
    MegatronRing,
    install,
    refusals,
    use_ring_positions,
)

WHOLE = {"cuda_graph_impl": "full_iteration"}
OFFLOAD = {"fine_grained_activation_offloading": True, "offload_modules": ["core_attn"]}


def refused(**given: Any) -> str:
    """What is said of a config; its fields are set, as versions of Megatron check them in their own
    ways.
    """
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, attention_dropout=0.0
    )
    for name, value in given.items():
        setattr(config, name, value)
    return raised(refusals.refuse_config, config, "self")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (WHOLE, ""),
        ({"cuda_graph_impl": "local", "cuda_graph_modules": ["attn"]}, ""),
        ({"cuda_graph_impl": "local"}, "no CUDA graphs of whole layers"),
        ({"cuda_graph_impl": "local", "cuda_graph_scope": ["full_iteration"]}, ""),
        (
            {"cuda_graph_impl": "transformer_engine"},
            "no CUDA graphs of the form transformer_engine; use cuda_graph_impl 'none'",
        ),
        ({**WHOLE, "attention_dropout": 0.1}, "would drop the same weights in every step"),
        ({**WHOLE, "log_max_attention_logit": True}, "would keep its first scores"),
        (OFFLOAD, "no offloading of core_attn without Transformer Engine"),
        ({"experimental_attention_variant": "dsa"}, "no experimental_attention_variant 'dsa'"),
        ({"fp8_dot_product_attention": True}, "no fp8_dot_product_attention"),
        ({"batch_invariant_mode": True}, "no batch_invariant_mode"),
        ({**OFFLOAD, "offload_modules": ["moe_act"]}, ""),
        ({"qk_clip": True, "log_max_attention_logit": True}, ""),
    ],
    ids=str,
)
def test_names_what_it_refuses(given: dict[str, Any], message: str) -> None:
    assert message in refused(**given) if message else refused(**given) == ""


def test_offloads_by_the_switch_of_transformer_engine() -> None:
    with mock.patch.object(transformer_engine, "cpu_offload", object(), create=True):
        assert refused(**OFFLOAD) == ""


class Mixer(torch.nn.Module):
    """A state-space or linear-attention layer, as Megatron's are known by."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj = torch.nn.Linear(2, 2)


Mixer.__module__ = "megatron.core.ssm.mamba_mixer"


def positions_refused(size: int) -> dict[str, str]:
    """What is said of models whose tokens would be elsewhere than their layers take them to be."""
    given = case(ring=size)
    start(given)
    group = parallel_state.get_context_parallel_group()
    stock = MegatronRing.from_group(group)
    striped = MegatronRing.from_group(group, layout="striped")

    def model(asked: Case = given, **changes: Any) -> GPTModel:
        made = install(given.options)
        try:
            found = built(asked)
        finally:
            made.remove()
        for name, value in changes.items():
            setattr(found if hasattr(found, name) else found.config, name, value)
        return found

    mixed = model()
    mixed.mixer = Mixer()
    packed = PackedSeqParams("thd", *[torch.tensor([0, 16, SEQ_LEN])] * 2)
    tokens = torch.zeros(1, SEQ_LEN // size, dtype=torch.long)
    latent: dict[str, Any] = {"multi_latent_attention": True, "apply_rope_fusion": True}
    learned = replace(given, positions="learned_absolute")
    return {
        "inference": raised(model(learned), tokens, tokens, None, inference_context=object()),
        "mixer": raised(use_ring_positions, mixed, striped),
        "mixer in zigzag": raised(use_ring_positions, mixed, stock),
        "packed mixer": raised(mixed, tokens, tokens, None, packed_seq_params=packed),
        "multimodal": raised(use_ring_positions, model(position_embedding_type="mrope"), stock),
        "fused": raised(use_ring_positions, model(**latent), stock),
        "extra layers": raised(use_ring_positions, model(mtp_num_layers=1), stock),
    }


def test_a_path_that_cannot_follow_the_layout_is_refused(world: Callable[[int], World]) -> None:
    messages = {
        "inference": "a ring serves training",
        "mixer": "mixes tokens in Megatron's zigzag order; use --ring-layout zigzag",
        "packed mixer": "would mix the tokens of packed documents",
        "multimodal": "got 'mrope'",
        "fused": "no fused rotary positions in multi-latent attention",
        "extra layers": "call install(options) before the model is built",
    }
    for said in world(2).run(positions_refused, 2):
        assert {name: said[name] for name in messages if messages[name] not in said[name]} == {}
        assert said["mixer in zigzag"] == ""
