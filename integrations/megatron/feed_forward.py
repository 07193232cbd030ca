"""The dense feed-forward of a Megatron model by chunks of tokens."""

from functools import partial
from types import MethodType

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ring_sp import blockwise
from ring_sp.integrations.megatron.graphs import form_of, modules


def use_blockwise(model: MegatronModule, chunk: int) -> int:
    """Compute each dense feed-forward `chunk` tokens of a rank's sequences at a time, and again in
    backward, so that what it keeps is its input and, for a moment, the middle of one chunk; returns
    how many there are.

    In place: the modules keep their names, weights and hooks. With tensor-sequence parallelism a
    chunk has its tokens from all tensor ranks, which gather them chunk by chunk. Weights' gradients
    are summed over the chunks where Megatron sums them over micro-batches, in float32, or without
    gradient_accumulation_fusion in the dtype of the weights, as `ring_sp.blockwise` says. Mixtures
    of experts are left as they are. Raises ValueError for a chunk below 1 and a second call, and
    NotImplementedError for what Megatron does to whole feed-forwards, and where no stage has a
    dense one.
    """
    if chunk < 1:
        raise ValueError(f"chunk is a number of tokens, at least 1; got {chunk}")
    config = model.config
    _refuse(config)
    found = {n: m for n, m in model.named_modules() if n.split(".")[-1] == "mlp"}
    dense = {n: m for n, m in found.items() if not isinstance(m, MoELayer | IdentityOp)}
    for name, module in dense.items():
        if type(module) is not MLP:
            raise NotImplementedError(
                f"{name} is a {type(module).__name__}; only Megatron's MLP is computed by chunks"
            )
        if "forward" in vars(module):
            raise ValueError(f"the forward of {name} was replaced already; call use_blockwise once")
    if not dense and not _dense_elsewhere(model):
        raise NotImplementedError(
            "no layer has a dense feed-forward; leave --ring-ff-chunk out. Experts, whose router "
            "looks at all tokens, are computed again by Megatron's --recompute-modules moe"
        )
    tensor = config.tensor_model_parallel_size if config.sequence_parallel else 1
    for module in dense.values():
        module.forward = MethodType(partial(_by_chunks, rows=-(-chunk // tensor)), module)
    return len(dense)


def _dense_elsewhere(model: MegatronModule) -> bool:
    """Whether a model without a dense feed-forward in this stage has one in another."""
    config = model.config
    if config.pipeline_model_parallel_size == 1:
        return False
    if (layers := getattr(model, "hybrid_layer_pattern", None)) is not None:
        return "-" in layers
    every = config.moe_layer_freq
    experts = all(every) if isinstance(every, list) else every == 1
    return config.num_moe_experts is None or not experts


def _by_chunks(
    module: MLP, hidden_states: Tensor, *, rows: int, **others: object
) -> tuple[Tensor, Tensor | None]:
    """What the module's own forward gives of hidden_states [s, b, h]: the same with `rows` at a
    time, and its bias, which Megatron adds later. Raises NotImplementedError under Megatron-FSDP
    with gradient_accumulation_fusion.
    """
    if module.config.gradient_accumulation_fusion and any(
        hasattr(weight, "__fsdp_param__") for weight in module.parameters()
    ):
        raise NotImplementedError(
            "Megatron-FSDP with gradient_accumulation_fusion keeps the last chunk's gradients of a "
            "weight only; give --no-gradient-accumulation-fusion, or leave --ring-ff-chunk out"
        )
    biases: list[Tensor | None] = []

    def feed(part: Tensor) -> Tensor:
        out, bias = type(module).forward(module, part, **others)
        biases[:] = [bias]
        return out

    return blockwise(feed, hidden_states, rows, 0), biases[0]


def _refuse(config: TransformerConfig) -> None:
    in_graph = form_of(config) not in ("none", "local") or "mlp" in modules(config)
    selective = config.recompute_granularity == "selective"
    unsupported = {
        "mlp in recompute_modules: chunks are computed again already": (
            selective and "mlp" in (config.recompute_modules or [])
        ),
        "mlp_chunks_for_training, which keeps what all its chunks need: set it to 1": (
            getattr(config, "mlp_chunks_for_training", 1) > 1
        ),
        "CUDA graph of them, which was not tried: use cuda_graph_impl 'none', or 'local' with "
        "cuda_graph_modules attn": in_graph,
        "fp8 or fp4": bool(config.fp8 or getattr(config, "fp4", None)),
        "tp_comm_overlap, whose buffers have the size of a whole sequence": config.tp_comm_overlap,
        "delay_wgrad_compute": getattr(config, "delay_wgrad_compute", False),
    }
    if given := [name for name, present in unsupported.items() if present]:
        raise NotImplementedError(f"feed-forwards by chunks go with no {'; no '.join(given)}")
