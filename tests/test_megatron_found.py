"""Which of apex's parts a model gets."""

from pathlib import Path

import pytest

pytest.importorskip("megatron")
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron_gpt import case, config

from ring_sp.integrations.megatron import spec as specs
from ring_sp.integrations.megatron.found import Found, used
from ring_sp.integrations.megatron.norm import TensorSequenceNorm

ADAM, NORM, WEIGHTS = "amp_C", "fused_layer_norm_cuda", "fused_weight_gradient_mlp_cuda"
PLAIN, BY_TORCH = "torch, tagged by ring_sp", "accumulated by torch; needs"


@pytest.mark.parametrize(
    ("engine", "apex", "extensions", "norms", "adam", "weights"),
    [
        (None, None, (), PLAIN, "torch", BY_TORCH),
        (None, "NVIDIA", (NORM,), f"apex; RMSNorm {PLAIN}", "apex, which fails", BY_TORCH),
        (None, "NVIDIA", (ADAM, WEIGHTS), PLAIN, "apex", "accumulated in the matrix product"),
        ("2.9", None, (), "Transformer Engine; with", "Transformer Engine", BY_TORCH),
    ],
)
def test_a_model_gets_what_is_really_there(
    engine: str | None,
    apex: str | None,
    extensions: tuple[str, ...],
    norms: str,
    adam: str,
    weights: str,
) -> None:
    parts = used(Found("0.19.2", Path(), True, engine, apex, frozenset(extensions), {}))
    assert parts["norms"].startswith(norms)
    assert parts["Adam"].startswith(adam)
    assert parts["weight gradients"].startswith(weights)


@pytest.mark.parametrize(
    ("normalization", "extension", "norm"),
    [
        ("LayerNorm", "fused_layer_norm_cuda", FusedLayerNorm),
        ("LayerNorm", "amp_C", TensorSequenceNorm),
        ("RMSNorm", "fused_layer_norm_cuda", TensorSequenceNorm),
    ],
)
def test_apexs_norm_is_taken_where_its_kernel_is_there_and_serves(
    normalization: str, extension: str, norm: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(specs, "apex", lambda: ("NVIDIA", frozenset({extension})))
    given = config(case(config={"normalization": normalization}))
    layer = get_gpt_layer_local_spec()
    # As Megatron has it wherever a package apex is.
    layer.submodules.input_layernorm = FusedLayerNorm
    assert specs.with_tensor_sequence_norms(layer, given).submodules.input_layernorm is norm
