"""Ring attention inside Megatron-core: one flag on a stock training script, or its parts.

Nothing of Megatron is imported before a name is asked for, so that a launcher may say first which
Megatron it is.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ring_sp.integrations.megatron.core_attention import RingCoreAttention
    from ring_sp.integrations.megatron.feed_forward import use_blockwise
    from ring_sp.integrations.megatron.graphs import drop_graphs
    from ring_sp.integrations.megatron.installation import Installation, install
    from ring_sp.integrations.megatron.options import RingOptions, add_ring_args
    from ring_sp.integrations.megatron.ring import MegatronRing, RingSequenceParams
    from ring_sp.integrations.megatron.rotary import RingRotaryEmbedding, use_ring_positions
    from ring_sp.integrations.megatron.spec import with_ring_attention

__all__ = [
    "Installation",
    "MegatronRing",
    "RingCoreAttention",
    "RingOptions",
    "RingRotaryEmbedding",
    "RingSequenceParams",
    "add_ring_args",
    "drop_graphs",
    "install",
    "use_blockwise",
    "use_ring_positions",
    "with_ring_attention",
]

_HOMES = {
    "Installation": "installation",
    "MegatronRing": "ring",
    "RingCoreAttention": "core_attention",
    "RingOptions": "options",
    "RingRotaryEmbedding": "rotary",
    "RingSequenceParams": "ring",
    "add_ring_args": "options",
    "drop_graphs": "graphs",
    "install": "installation",
    "use_blockwise": "feed_forward",
    "use_ring_positions": "rotary",
    "with_ring_attention": "spec",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
