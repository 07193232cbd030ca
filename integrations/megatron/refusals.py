"""What of a Megatron config the ring cannot do, said before anything is built."""

from megatron.core.extensions import transformer_engine
from megatron.core.transformer.transformer_config import TransformerConfig

SOFTMAX_TYPES = ("vanilla", "off-by-one", "learnable")

PROVEN_GRAPHS: tuple[str, ...] = ()
"""Forms of Megatron's CUDA graphs in which a run on GPUs has given a ring's losses.

"full_iteration" should: it is one capture by torch.cuda.graph after some steps without, in which a
ring makes its tables; it waits for no device. "local" and "transformer_engine" capture each layer
by itself, in an order of Megatron's, which no test here follows.
"""


def refuse_config(config: TransformerConfig, attention_type: str) -> None:
    """Raise NotImplementedError for settings that change the scores and that the ring lacks."""
    softmax_type = getattr(config, "softmax_type", "vanilla")
    variant = getattr(config, "experimental_attention_variant", None)
    unsupported = {
        f"attention_type {attention_type!r}": attention_type not in ("self", "cross"),
        f"softmax_type {softmax_type!r}; use one of {', '.join(SOFTMAX_TYPES)}": (
            softmax_type not in SOFTMAX_TYPES
        ),
        f"experimental_attention_variant {variant!r}": variant is not None,
        "fp8_dot_product_attention": getattr(config, "fp8_dot_product_attention", False),
        "batch_invariant_mode": getattr(config, "batch_invariant_mode", False),
        **_graphs(config),
        "offloading of core_attn without Transformer Engine, by whose switch Megatron offloads; "
        "take it out of offload_modules": (
            getattr(config, "fine_grained_activation_offloading", False)
            and "core_attn" in (config.offload_modules or [])
            and getattr(transformer_engine, "cpu_offload", None) is None
        ),
    }
    found = [name for name, present in unsupported.items() if present]
    if found:
        raise NotImplementedError(f"RingCoreAttention has no {'; no '.join(found)}")


def _graphs(config: TransformerConfig) -> dict[str, bool]:
    """What of CUDA graphs is refused: a replay runs no Python."""
    form = graph_form(config)
    return {
        f"CUDA graphs of the form {form}; use cuda_graph_impl 'none'": (
            form not in ("none", *PROVEN_GRAPHS)
        ),
        "attention dropout in a CUDA graph, which would drop the same weights in every step": (
            form != "none" and config.attention_dropout > 0
        ),
        "qk_clip or log_max_attention_logit in a CUDA graph, which would keep its first scores": (
            form != "none" and (config.qk_clip or config.log_max_attention_logit)
        ),
    }


def graph_form(config: TransformerConfig) -> str:
    """How Megatron would record work as CUDA graphs; Megatron-core 0.16 calls a whole iteration a
    scope.
    """
    impl: str = getattr(config, "cuda_graph_impl", None) or "none"
    scopes = getattr(config, "cuda_graph_scope", None) or []
    whole = any(getattr(scope, "name", scope) == "full_iteration" for scope in scopes)
    return "full_iteration" if impl == "local" and whole else impl
