"""The ring as what Megatron's `--spec` names; nothing of Megatron is replaced:

    --context-parallel-size N --spec ring_sp.integrations.megatron.layer_spec ring_layer_spec

Megatron splits batches and turns positions itself, so the layout is its own, zigzag. The ring takes
no mask tensors: Megatron-LM's pretrain_gpt.py wants --no-create-attention-mask-in-dataloader too.
"""

from typing import TYPE_CHECKING

from megatron.core import parallel_state
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from ring_sp.integrations.megatron.check import warn_of_loss
from ring_sp.integrations.megatron.ring import MegatronRing
from ring_sp.integrations.megatron.spec import block_spec, with_ring_attention

if TYPE_CHECKING:
    from megatron.training.models.gpt import GPTModelConfig


def ring_layer_spec(
    config: "GPTModelConfig", vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers that Megatron builds for this config, with the ring over its context-parallel
    group in each attention.

    For Megatron-core from 0.18 on, whose builder of GPTs calls it. Raises NotImplementedError for
    multi-token prediction, whose layers `--spec` does not reach, and for documents that Megatron
    cuts in another way than it turns their positions.
    """
    from megatron.training import global_vars
    from megatron.training.models.gpt import default_layer_spec

    if config.transformer.mtp_num_layers:
        raise NotImplementedError(
            "--spec does not reach the layers of --mtp-num-layers, which would keep Megatron's own "
            "attention: start the script with python -m ring_sp.integrations.megatron and "
            "--sequence-parallel-ring in place of --spec"
        )
    # None where a library builds the model.
    args = vars(global_vars)["_GLOBAL_ARGS"]
    whole = getattr(args, "dataloader_inter_document_masking", False) and not args.sft
    ring = MegatronRing.from_group(parallel_state.get_context_parallel_group())
    if whole and ring.topology.size > 1:
        raise NotImplementedError(
            "with --dataloader-inter-document-masking Megatron cuts whole sequences, and positions "
            "document by document: start the script with python -m ring_sp.integrations.megatron "
            "and --sequence-parallel-ring in place of --spec"
        )
    warn_of_loss(config.transformer, ring)
    layers = with_ring_attention(default_layer_spec(config, vp_stage), ring)
    return block_spec(layers, config.transformer, vp_stage)
