"""Exact ring attention for sequences too long for one GPU."""

from ring_sp import layout, masks
from ring_sp.attention import ring_attention
from ring_sp.blockwise import blockwise
from ring_sp.checkpointing import Checkpointing, attention_kept, checkpoint
from ring_sp.explanation import Explanation, explain
from ring_sp.linear_loss import LinearLoss, linear_cross_entropy
from ring_sp.logits import max_logits
from ring_sp.modules import AttentionConfig, RingAttention
from ring_sp.offload import Offload
from ring_sp.sequence import ShardedSequence
from ring_sp.topology import ProcessGroupManager, Topology
from ring_sp.transformer import RingTransformer

__all__ = [
    "AttentionConfig",
    "Checkpointing",
    "Explanation",
    "LinearLoss",
    "Offload",
    "ProcessGroupManager",
    "RingAttention",
    "RingTransformer",
    "ShardedSequence",
    "Topology",
    "attention_kept",
    "blockwise",
    "checkpoint",
    "explain",
    "layout",
    "linear_cross_entropy",
    "masks",
    "max_logits",
    "ring_attention",
]
