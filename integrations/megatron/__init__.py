"""Ring attention inside Megatron-core: its core attention, rotary positions and layer specs."""

from ring_sp.integrations.megatron.core_attention import RingCoreAttention
from ring_sp.integrations.megatron.ring import MegatronRing, RingSequenceParams
from ring_sp.integrations.megatron.rotary import RingRotaryEmbedding, use_ring_positions
from ring_sp.integrations.megatron.spec import with_ring_attention

__all__ = [
    "MegatronRing",
    "RingCoreAttention",
    "RingRotaryEmbedding",
    "RingSequenceParams",
    "use_ring_positions",
    "with_ring_attention",
]
