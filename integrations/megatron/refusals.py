"""What of a Megatron config the ring cannot do, said before anything is built."""

from megatron.core.extensions import transformer_engine
from megatron.core.transformer.transformer_config import TransformerConfig

from ring_sp.integrations.megatron import graphs

SOFTMAX_TYPES = ("vanilla", "off-by-one", "learnable")


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
        **graphs.unsupported(config),
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
