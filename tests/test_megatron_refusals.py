"""What of a Megatron config is refused before anything is built."""

from typing import Any
from unittest import mock

import pytest

pytest.importorskip("megatron")
from megatron.core.extensions import transformer_engine
from megatron.core.transformer.transformer_config import TransformerConfig
from ranks import raised

from ring_sp.integrations.megatron import graphs, refusals

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
        (WHOLE, "no CUDA graphs of the form full_iteration; use cuda_graph_impl 'none'"),
        ({"cuda_graph_impl": "local"}, "no CUDA graphs of the form local"),
        ({"cuda_graph_impl": "transformer_engine"}, "of the form transformer_engine"),
        (OFFLOAD, "no offloading of core_attn without Transformer Engine"),
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


def test_a_graph_that_is_proven_still_replays_no_python() -> None:
    scoped = {"cuda_graph_impl": "local", "cuda_graph_scope": ["full_iteration"]}
    with mock.patch.object(graphs, "PROVEN", ("full_iteration",)):
        assert refused(**WHOLE) == refused(**scoped) == ""
        assert "form local" in refused(cuda_graph_impl="local", cuda_graph_scope=[])
        assert "drop the same weights" in refused(**WHOLE, attention_dropout=0.1)
        assert "keep its first scores" in refused(**WHOLE, log_max_attention_logit=True)
