from collections.abc import Callable
from copy import copy

import pytest
import torch
import torch.distributed as dist
from conftest import World

pytest.importorskip("megatron")
pytest.importorskip("megatron.core.models.hybrid.hybrid_block")
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.hybrid import hybrid_block
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.models.mamba.mamba_model import MambaModel
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron_gpt import SEQ_LEN, VOCAB, Case, batch, case, config, drawn, start
from megatron_on_cpu import OnCpu
from ringed import relative

from ring_sp.integrations.megatron import RingOptions, install
from ring_sp.integrations.megatron.check import require_ring_everywhere
from ring_sp.integrations.megatron.norm import TensorSequenceNorm

Result = tuple[torch.Tensor, dict[str, torch.Tensor]]


def stack() -> ModuleSpec:
    """A hybrid model's layers, of Megatron's parts that need no Transformer Engine."""
    whole = get_gpt_layer_local_spec()
    attends, thinks = copy(whole.submodules), copy(whole.submodules)
    attends.mlp, attends.mlp_bda, attends.pre_mlp_layernorm = IdentityOp, IdentityFuncOp, IdentityOp
    thinks.self_attention, thinks.self_attn_bda = IdentityOp, IdentityFuncOp
    thinks.input_layernorm = IdentityOp
    return ModuleSpec(
        module=hybrid_block.HybridStack,
        submodules=hybrid_block.HybridStackSubmodules(
            attention_layer=ModuleSpec(module=whole.module, submodules=attends),
            mlp_layer=ModuleSpec(module=MLPLayer, submodules=thinks),
        ),
    )


def run(given: Case) -> Result:
    """Whole logits, and gradients summed over the ranks."""
    start(given)
    # The block asks for Transformer Engine's norm by name.
    hybrid_block.TENorm = TensorSequenceNorm
    made = install(given.options)
    try:
        with OnCpu():
            model = HybridModel(
                config(given),
                stack(),
                vocab_size=VOCAB,
                max_sequence_length=SEQ_LEN,
                hybrid_layer_pattern="*-*-",
                position_embedding_type="rope",
            )
    finally:
        made.remove()
    model = drawn(model.double(), 1)
    sequence = made.built_ring().sequence(SEQ_LEN)
    tokens, cotangent = (sequence.shard(x) for x in batch(given, 0))
    logits = model(tokens, sequence.positions().expand_as(tokens), None)
    (logits * cotangent).sum().backward()
    grads = {name: w.grad for name, w in model.named_parameters() if w.grad is not None}
    for gradient in grads.values():
        dist.all_reduce(gradient)
    return sequence.unshard(logits.detach()), grads


@pytest.mark.parametrize("layout", ["zigzag", "striped"])
def test_a_hybrid_model_over_a_ring_equals_a_ring_of_one(
    world: Callable[[int], World], layout: str
) -> None:
    ((wanted, gradients),) = world(1).run(run, case())
    for logits, summed in world(2).run(run, case(ring=2, layout=layout)):
        assert relative(logits, wanted) < 1e-12
        for name, gradient in gradients.items():
            assert relative(summed[name], gradient) < 1e-11, name


def layers_under_the_old_name() -> int:
    """The ring layers of a model that is built as MambaModel."""
    start(case())
    hybrid_block.TENorm = TensorSequenceNorm
    made = install(RingOptions(ff_chunk=8))
    try:
        with OnCpu():
            model = MambaModel(
                config(case()),
                mamba_stack_spec=stack(),
                vocab_size=VOCAB,
                max_sequence_length=SEQ_LEN,
                hybrid_layer_pattern="*-*-",
            )
    finally:
        made.remove()
    return require_ring_everywhere(model, made.built_ring())


def test_a_hybrid_model_has_an_old_name(world: Callable[[int], World]) -> None:
    assert world(1).run(layers_under_the_old_name) == [2]
