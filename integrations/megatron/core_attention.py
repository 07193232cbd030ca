"""The core attention of a Megatron layer as a ring over the context-parallel group."""

from typing import Any

import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from ring_sp import ShardedSequence, masks, ring_attention
from ring_sp.integrations.megatron.ring import MegatronRing, RingSequenceParams

MASKS = {AttnMaskType.causal: masks.causal(), AttnMaskType.no_mask: masks.full()}


class RingCoreAttention(MegatronModule):
    """Takes the place of `DotProductAttention` in a layer spec; has no parameters and makes no
    process groups, so that Megatron may build it as often as it likes.

    Query, key and value are [s / cp, b, heads / tp, d] with grouped keys not expanded; the result
    is [s / cp, b, heads / tp * dv].
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        ring: MegatronRing | None = None,
        **others: Any,
    ) -> None:
        """`ring` comes from `ModuleSpec.params`; without it the context-parallel group is one
        ring in zigzag layout.

        Raises NotImplementedError for what the ring would otherwise ignore, and ValueError if
        `ring` is not that of the context-parallel group, or for a `cp_comm_type` other than p2p.
        """
        super().__init__(config=config)
        if pg_collection is None:
            raise ValueError("RingCoreAttention needs the pg_collection that Megatron passes")
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        _refuse_unsupported(config, attention_type, dropout)
        self.ring = ring or MegatronRing.from_group(pg_collection.cp)
        _require_ring_over(pg_collection.cp, self.ring)
        if others.get("cp_comm_type") not in (None, "p2p"):
            raise ValueError(
                f"the ring communicates in its own way; got cp_comm_type "
                f"{others['cp_comm_type']!r}. Leave it out, and for Ulysses say "
                f"MegatronRing.from_group(..., ulysses=)."
            )
        self.layer_number, self.attn_mask_type = layer_number, attn_mask_type
        # Megatron's query-key layer scaling divides here and multiplies back inside the softmax.
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> Tensor:
        """See the class. Raises ValueError for a mask tensor or mask type that the ring cannot
        follow, NotImplementedError for an attention bias or Megatron's own packed format.
        """
        if attention_bias is not None:
            raise NotImplementedError("RingCoreAttention has no attention bias")
        if attention_mask is not None:
            raise ValueError(
                "RingCoreAttention takes no attention_mask tensor: pass None, and say masks other "
                "than causal with RingSequenceParams as packed_seq_params"
            )
        sequence = self._sequence(
            query.shape[0], attn_mask_type or self.attn_mask_type, packed_seq_params
        )
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        out = ring_attention(q, k, v, sequence, scale=self.softmax_scale, kernel=self.ring.kernel)
        return out.transpose(0, 1).flatten(2)

    def _sequence(
        self, local_len: int, mask_type: AttnMaskType, params: PackedSeqParams | None
    ) -> ShardedSequence:
        ring = self.ring
        if isinstance(params, RingSequenceParams) and params.sequence is not None:
            if getattr(params.sequence, "topology", None) != ring.topology:
                raise ValueError(
                    "the sequence in RingSequenceParams lives on another topology than this "
                    "layer's ring: make it with ShardedSequence(seq_len, ring.topology, ...)"
                )
            return ring.placed(params.sequence)
        if params is not None and not isinstance(params, RingSequenceParams):
            raise NotImplementedError(
                "RingCoreAttention does not read Megatron's packed sequences; pass "
                "RingSequenceParams(sequence=...) with masks.documents(cu_seqlens)"
            )
        if mask_type not in MASKS:
            raise ValueError(
                f"RingCoreAttention needs an attn_mask_type of causal or no_mask; got {mask_type}"
            )
        return ring.placed(ring.sequence(local_len * ring.topology.size, MASKS[mask_type]))


def _require_ring_over(group: ProcessGroup, ring: MegatronRing) -> None:
    wanted, found = dist.get_process_group_ranks(group), [dist.get_rank()]
    if ring.topology.group is not None:
        found = dist.get_process_group_ranks(ring.topology.group)
    if found != wanted:
        raise ValueError(
            f"the ring was made for the ranks {found}, Megatron's context-parallel group has "
            f"{wanted}. Make it with "
            f"MegatronRing.from_group(parallel_state.get_context_parallel_group())."
        )


def _refuse_unsupported(config: TransformerConfig, attention_type: str, dropout: float) -> None:
    """Raise NotImplementedError for settings that change the scores and that the ring lacks."""
    softmax_type = getattr(config, "softmax_type", "vanilla")
    unsupported = {
        f"attention_type {attention_type!r}": attention_type != "self",
        f"attention_dropout {dropout}; use 0": dropout != 0,
        f"window_size {config.window_size}": config.window_size is not None,
        f"softmax_type {softmax_type!r}; use 'vanilla'": softmax_type != "vanilla",
        "multi_latent_attention": config.multi_latent_attention,
        "multi-token prediction (mtp_num_layers)": bool(getattr(config, "mtp_num_layers", None)),
        "qk_clip": getattr(config, "qk_clip", False),
        "log_max_attention_logit": getattr(config, "log_max_attention_logit", False),
        "fp8_dot_product_attention": getattr(config, "fp8_dot_product_attention", False),
    }
    found = [name for name, present in unsupported.items() if present]
    if found:
        raise NotImplementedError(f"RingCoreAttention has no {'; no '.join(found)}")
