"""Small GPTs of Megatron's in float64, their weights and batches."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron_on_cpu import OnCpu, pretend_there_is_a_gpu
from torch import Tensor

from ring_sp.integrations.megatron import RingOptions

SEQ_LEN, VOCAB, BATCH, LAYERS, HEADS = 48, 32, 2, 2, 4

MLA = {
    "multi_latent_attention": True,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 12,
    "qk_layernorm": True,
    "apply_rope_fusion": False,
}
YARN = {
    "yarn_rotary_scaling_factor": 4.0,
    "yarn_original_max_position_embeddings": 16,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_mscale": 1.0,
    "yarn_mscale_all_dim": 0.0,
    "yarn_correction_range_round_to_int": True,
}
MTP = {"mtp_num_layers": 1, "calculate_per_token_loss": True}
MOE = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_token_dispatcher_type": "allgather",
    "moe_router_load_balancing_type": "none",
    "add_bias_linear": False,
}


@dataclass(frozen=True)
class Case:
    """How the ranks of a world share a GPT, and what it is."""

    tensor: int = 1
    ring: int = 1
    ulysses: int = 1
    outer: int = 1
    layout: str = "zigzag"
    positions: str = "rope"
    groups: int = 2
    config: tuple[tuple[str, Any], ...] = ()
    cuts: tuple[int, ...] = ()
    """cu_seqlens of packed documents."""
    lens: tuple[int, ...] = ()
    """Tokens of each document, where some are padded."""

    @property
    def options(self) -> RingOptions:
        return RingOptions(self.ring, self.layout, ulysses=self.ulysses, outer=self.outer)

    def __str__(self) -> str:
        default = Case()
        given = {k: v for k, v in vars(self).items() if v != getattr(default, k)}
        given.update(given.pop("config", ()))
        return ", ".join(f"{name} {value}" for name, value in given.items())


def case(*, config: dict[str, Any] | None = None, **given: Any) -> Case:
    return Case(config=tuple((config or {}).items()), **given)


def alone(given: Case) -> Case:
    return replace(given, tensor=1, ring=1, ulysses=1, outer=1)


def start(given: Case) -> None:
    """Megatron's groups for a case: those at hand if their sizes fit."""
    pretend_there_is_a_gpu()
    if not parallel_state.model_parallel_is_initialized() or (given.tensor, given.ring) != (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
    ):
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=given.tensor, context_parallel_size=given.ring
        )
    model_parallel_cuda_manual_seed(3, inference_rng_tracker=True, force_reset_rng=True)


def config(given: Case) -> TransformerConfig:
    options: dict[str, Any] = dict(given.config)
    kind = MLATransformerConfig if options.get("multi_latent_attention") else TransformerConfig
    if given.tensor == 1:
        options.pop("sequence_parallel", None)
    # Megatron's scripts put what YaRN needs on the config beside its fields.
    yarn = {name: options.pop(name) for name in YARN if name in options}
    made = kind(
        **{
            "num_layers": LAYERS,
            "hidden_size": 32,
            "num_attention_heads": HEADS,
            "num_query_groups": given.groups,
            "tensor_model_parallel_size": given.tensor,
            "context_parallel_size": given.ring,
            "use_cpu_initialization": True,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "gradient_accumulation_fusion": False,
            "calculate_per_token_loss": True,
            **options,
        }
    )
    for name, value in yarn.items():
        setattr(made, name, value)
    return made


def built(given: Case) -> GPTModel:
    """A GPT as a script builds it, its weights the same whatever the ranks."""
    made = config(given)
    layers = get_gpt_decoder_block_spec(made, use_transformer_engine=False)
    extra: dict[str, Any] = {}
    if made.mtp_num_layers:
        extra["mtp_block_spec"] = get_gpt_mtp_block_spec(
            made, layers.layer_specs[-1], use_transformer_engine=False
        )
    with OnCpu():
        model = GPTModel(
            made,
            layers,
            vocab_size=VOCAB,
            max_sequence_length=SEQ_LEN,
            position_embedding_type=given.positions,
            **extra,
        )
    return drawn(model.double(), given.tensor)


def drawn(model: GPTModel, tensor: int) -> GPTModel:
    """The model with weights drawn whole, each by its name, so that all ranks hold parts of one."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    for number, (name, weight) in enumerate(sorted(model.named_parameters())):
        split = tensor if getattr(weight, "tensor_model_parallel", False) else 1
        dim = weight.partition_dim if split > 1 else 0
        shape = [size * (split if axis == dim else 1) for axis, size in enumerate(weight.shape)]
        draw = torch.Generator().manual_seed(100 + number)
        whole = torch.randn(shape, generator=draw, dtype=torch.float64) * 0.2
        if "norm" in name and name.endswith("weight"):
            whole += 1
        weight.data.copy_(whole.chunk(split, dim)[rank % split])
    return model


def is_mtp(given: Case) -> bool:
    return "mtp_num_layers" in dict(given.config)


def batch(given: Case, data_rank: int) -> tuple[Tensor, Tensor]:
    """Whole tokens [B, S], and the cotangent of their logits or losses."""
    make = torch.Generator().manual_seed(5 + data_rank)
    rows = 1 if given.cuts else BATCH
    tokens = torch.randint(VOCAB, (rows, SEQ_LEN), generator=make)
    last = () if is_mtp(given) else (VOCAB,)
    return tokens, torch.randn(rows, SEQ_LEN, *last, generator=make, dtype=torch.float64)


def grads(model: GPTModel) -> dict[str, Tensor]:
    found = {name: weight.grad for name, weight in model.named_parameters()}
    return {name: torch.zeros(()) if g is None else g for name, g in found.items()}
