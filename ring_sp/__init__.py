"""Exact ring attention for sequences too long for one GPU."""

from ring_sp import layout, masks
from ring_sp.attention import ring_attention
from ring_sp.explanation import Explanation, explain
from ring_sp.logits import max_logits
from ring_sp.modules import AttentionConfig, RingAttention, RingTransformer
from ring_sp.sequence import ShardedSequence
from ring_sp.topology import ProcessGroupManager, Topology

__all__ = [
    "AttentionConfig",
    "Explanation",
    "ProcessGroupManager",
    "RingAttention",
    "RingTransformer",
    "ShardedSequence",
    "Topology",
    "explain",
    "layout",
    "masks",
    "max_logits",
    "ring_attention",
]
