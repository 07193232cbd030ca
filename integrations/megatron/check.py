"""Never half on: whether every attention layer of a built model is the ring's."""

import warnings

from megatron.core import __version__
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from ring_sp.integrations.megatron.core_attention import RingCoreAttention
from ring_sp.integrations.megatron.ring import MegatronRing
from ring_sp.integrations.megatron.spec import stock_cores


def require_ring_everywhere(model: MegatronModule, ring: MegatronRing) -> int:
    """The number of the model's ring layers.

    Raises ValueError that names an attention layer which is not the ring's, and
    NotImplementedError that names a layer which mixes tokens in Megatron's own zigzag order where
    the ring holds them in another.
    """
    stock, count = stock_cores(), 0
    for name, module in model.named_modules():
        core = getattr(module, "core_attention", None)
        if isinstance(module, stock) or not isinstance(core, RingCoreAttention | None):
            kind = type(module if core is None else core).__name__
            raise ValueError(
                f"{name or type(model).__name__} attends with {kind} and not with the ring; a "
                f"model is the ring's in all its layers or in none. Build it from specs that "
                f"with_ring_attention can change, or train it without the ring."
            )
        count += isinstance(module, RingCoreAttention)
        if mixes_tokens(module) and not ring.is_stock:
            raise NotImplementedError(
                f"{name} ({type(module).__name__}) mixes tokens in Megatron's zigzag order; use "
                f"--ring-layout zigzag without --ring-ulysses"
            )
    return count


def warn_of_loss(config: TransformerConfig, ring: MegatronRing) -> None:
    """Warn where loss and gradients may not be those of one rank."""
    if ring.topology.size == 1:
        return
    if config.mtp_num_layers and not __version__.startswith("0.16"):
        warnings.warn(
            "this Megatron weighs the losses of multi-token prediction by the tokens of each of "
            "the ring's ranks, one of which has the end of a sequence: these losses, and a little "
            "of all gradients, are not those of one rank",
            stacklevel=3,
        )
    if not config.calculate_per_token_loss:
        warnings.warn(
            "without --calculate-per-token-loss Megatron averages the means of the ring's ranks: "
            "where loss masks differ between ranks, as with padding or SFT, loss and gradients are "
            "not those of one rank",
            stacklevel=3,
        )


def mixes_tokens(module: object) -> bool:
    """Whether a module passes information between tokens in an order of its own: a state-space or
    linear-attention mixer.
    """
    return type(module).__module__.startswith("megatron.core.ssm.") and hasattr(module, "in_proj")
