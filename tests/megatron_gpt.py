"""Small GPTs of Megatron's in float64: stock on one rank by itself, and over a ring."""

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from ringed import relative
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ring_sp.integrations.megatron import Installation, MegatronRing, RingOptions, install

SEQ_LEN, VOCAB, BATCH, LAYERS, HEADS = 48, 32, 2, 2, 4
Result = tuple[Tensor, dict[str, Tensor]]

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


class OnCpu(TorchFunctionMode):
    """What Megatron puts on a GPU by name goes to the CPU."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if str(given.get("device", "")).startswith("cuda"):
            given["device"] = "cpu"
        return function(*args, **given)


def pretend_there_is_a_gpu() -> None:
    """Megatron makes some of its buffers on the current CUDA device, and 0.16 asks without
    Transformer Engine for a name from there.
    """
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]


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
    return kind(
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


def built(given: Case) -> GPTModel:
    """A GPT as a script builds it, its weights the same whatever the ranks."""
    torch.manual_seed(3)
    made = config(given)
    layers = get_gpt_decoder_block_spec(made, use_transformer_engine=False)
    extra: dict[str, Any] = {}
    if made.mtp_num_layers:
        extra["mtp_block_spec"] = get_gpt_mtp_block_spec(
            made, layers.layer_specs[-1], use_transformer_engine=False
        )
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


def labels(tokens: Tensor, counted: Tensor) -> dict[str, Tensor]:
    """What a model with multi-token prediction takes besides; its labels need no shift."""
    return {"labels": (tokens * 7 + 3) % VOCAB, "loss_mask": counted.double()}


def documents(given: Case) -> list[range]:
    """The real tokens of each document; all of them where nothing is packed."""
    cuts = given.cuts or (0, SEQ_LEN)
    lens = given.lens or tuple(stop - start for start, stop in pairwise(cuts))
    return [range(cut, cut + length) for cut, length in zip(cuts, lens, strict=False) if length]


def stock(given: Case, data_rank: int) -> Result:
    """What Megatron's own attention makes of a data rank's batch on one rank, each document by
    itself: logits (losses of a model with multi-token prediction), 0 in padding, and gradients.
    """
    start(alone(given))
    model = built(alone(given))
    tokens, cotangent = batch(given, data_rank)
    results = torch.zeros_like(cotangent)
    for held in documents(given):
        place = slice(held.start, held.stop)
        own = tokens[:, place]
        hidden = torch.ones(len(held), len(held), dtype=torch.bool).triu(1)[None, None]
        positions = torch.arange(len(held)).expand_as(own)
        extra = labels(own, torch.ones_like(own)) if is_mtp(given) else {}
        with OnCpu():
            out = model(own, positions, hidden, **extra)
        results[:, place] = out.detach()
        (out * cotangent[:, place]).sum().backward()
    return results, grads(model)


def ring_model(given: Case) -> tuple[GPTModel, MegatronRing]:
    """The model of a case, with the ring in all its layers."""
    start(given)
    made: Installation = install(given.options)
    try:
        return built(given), made.built_ring()
    finally:
        made.remove()


def packed(given: Case) -> PackedSeqParams | None:
    """What Megatron's scripts tell the model of packed documents."""
    if not given.cuts:
        return None
    cuts = torch.tensor(given.cuts, dtype=torch.int32)
    real, padded = cuts, None
    if given.lens:
        real = torch.tensor([*accumulate(given.lens, initial=0)], dtype=torch.int32)
        padded = cuts
    longest = int(cuts.diff().max())
    return PackedSeqParams("thd", real, real, padded, padded, longest, longest)


def errors(given: Case, whole: list[Result]) -> list[tuple[float, str]]:
    """How far this rank's logits and the summed gradients are from those of `stock`, which has each
    data rank's batch in turn; worst first.
    """
    data_rank = dist.get_rank() // (given.tensor * given.ring)
    start(given)
    made = install(given.options)
    try:
        model = built(given)
        ring = made.built_ring()
        params = packed(given)
        place = ring.packed(params) if params else None
        sequence = place.sequence if place else ring.sequence(SEQ_LEN)
        assert sequence is not None
        tokens, cotangent = (sequence.shard(x) for x in batch(given, data_rank))
        positions = place.positions() if place else sequence.positions()
        counted = torch.zeros(1, SEQ_LEN, dtype=torch.bool)
        for held in documents(given):
            counted[:, held.start : held.stop] = True
        counted = sequence.shard(counted)
        logits, gradients = step(given, model, tokens, cotangent, positions, counted, params)
    finally:
        made.remove()
    expected = sequence.shard(whole[data_rank][0])
    if expected.dim() == 3:
        expected = expected.chunk(given.tensor, -1)[parallel_state.get_tensor_model_parallel_rank()]
    logits[:, ~counted[0]] = 0
    summed = distances(given, gradients, whole, tagged(model))
    return sorted([(relative(logits, expected), "logits"), *summed], reverse=True)


def step(
    given: Case,
    model: GPTModel,
    tokens: Tensor,
    cotangent: Tensor,
    positions: Tensor,
    counted: Tensor,
    params: PackedSeqParams | None,
) -> Result:
    """This rank's logits or losses, and the gradients of its weights."""
    extra = labels(tokens, counted.expand_as(tokens)) if is_mtp(given) else {}
    out = model(tokens, positions.expand_as(tokens), None, packed_seq_params=params, **extra)
    if out.dim() == 3:
        rank = parallel_state.get_tensor_model_parallel_rank()
        cotangent = cotangent.chunk(given.tensor, -1)[rank] * counted[..., None]
    else:
        cotangent = cotangent * counted
    (out * cotangent).sum().backward()
    return out.detach(), grads(model)


def tagged(model: GPTModel) -> set[str]:
    """Weights whose gradients Megatron sums over tensor ranks."""
    if not model.config.sequence_parallel:
        return set()
    return {n for n, w in model.named_parameters() if getattr(w, "sequence_parallel", False)}


def distances(
    given: Case, gradients: dict[str, Tensor], whole: list[Result], tensor_sums: set[str]
) -> list[tuple[float, str]]:
    """How far the gradients, summed over ranks as Megatron does, are from those of one rank."""
    column = parallel_state.get_tensor_model_parallel_rank()
    found = []
    for name, gradient in gradients.items():
        dist.all_reduce(
            gradient, group=parallel_state.get_data_parallel_group(with_context_parallel=True)
        )
        if name in tensor_sums:
            dist.all_reduce(gradient, group=parallel_state.get_tensor_model_parallel_group())
        wanted = torch.stack([one[1][name] for one in whole]).sum(0)
        for dim, size in enumerate(gradient.shape):
            if wanted.shape[dim] != size:
                wanted = wanted.chunk(given.tensor, dim)[column]
        found.append((relative(gradient, wanted), name))
    return found
