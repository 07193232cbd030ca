"""The core attention of a Megatron layer as a ring over the context-parallel group."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.distributed import ProcessGroup

from ring_sp import ShardedSequence, max_logits, ring_attention
from ring_sp.integrations.megatron import graphs
from ring_sp.integrations.megatron.dropout import next_seed
from ring_sp.integrations.megatron.layer_mask import rule, window_of, within
from ring_sp.integrations.megatron.recomputation import keeps
from ring_sp.integrations.megatron.refusals import refuse_config
from ring_sp.integrations.megatron.ring import MegatronRing, RingSequenceParams


class RingCoreAttention(MegatronModule):
    """Takes the place of `DotProductAttention` in a layer spec; makes no process groups, so that
    Megatron may build it as often as it likes. Its one parameter, with learnable sinks, is
    `softmax_offset` [heads / tp], as in Megatron's own.

    Query, key and value are [s / cp, b, heads / tp, d] with grouped keys not expanded, or packed
    [t / cp, heads / tp, d]; the result is [s / cp, b, heads / tp * dv], or [t / cp, heads / tp *
    dv] for Megatron's own packed format.
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
        refuse_config(config, attention_type)
        self.dropout_p: float = (
            config.attention_dropout if attention_dropout is None else attention_dropout
        )
        self.ring = ring or MegatronRing.from_group(pg_collection.cp)
        _require_ring_over(pg_collection.cp, self.ring)
        if others.get("cp_comm_type") not in (None, "p2p"):
            raise ValueError(
                f"the ring communicates in its own way; got cp_comm_type "
                f"{others['cp_comm_type']!r}. Leave it out, and for Ulysses say "
                f"MegatronRing.from_group(..., ulysses=), or --ring-ulysses."
            )
        self.layer_number, self.attn_mask_type = layer_number, attn_mask_type
        self.attention_type = attention_type
        # Megatron's query-key layer scaling divides here and multiplies back inside the softmax.
        self.softmax_scale = softmax_scale
        self.window = window_of(config, layer_number)
        if self.window is not None and self.ring.layout == "balanced":
            raise NotImplementedError(
                "the balanced layout follows the mask, and layers with a window have another than "
                "the batch; use --ring-layout zigzag, striped or contiguous with window_size"
            )
        self.tp_group = pg_collection.tp
        self._keeps = keeps(config, self.ring.keep_attention)
        self._watches: bool = config.qk_clip or config.log_max_attention_logit
        self.current_max_attn_logits: Tensor | None = None
        """The largest score of each head since Megatron last took it, float32 [heads / tp]: of this
        rank's queries in training; None before. Megatron asks all ranks for the largest.
        """
        self._make_sinks(config)

    def _make_sinks(self, config: TransformerConfig) -> None:
        """`softmax_offset` as Megatron has it: None, zeros that are no parameter, or learnable."""
        kind = getattr(config, "softmax_type", "vanilla")
        self.softmax_offset: Tensor | None
        if kind == "vanilla":
            self.softmax_offset = None
            return
        on_cpu = config.use_cpu_initialization or not torch.cuda.is_available()
        device = "cpu" if on_cpu else torch.cuda.current_device()
        heads = config.num_attention_heads // self.tp_group.size()
        offsets = torch.zeros(heads, device=device, dtype=config.params_dtype)
        if kind == "off-by-one":
            self.register_buffer("softmax_offset", offsets, persistent=False)
            return
        self.register_parameter("softmax_offset", torch.nn.Parameter(offsets))
        if config.perform_initialization:
            config.init_method(self.softmax_offset)
        # Each tensor rank has heads of its own: without this the norm of the gradient leaves all
        # but the first rank's out.
        set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)

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
        follow, NotImplementedError for an attention bias, and for packed sequences in a CUDA graph.
        """
        graphs.refuse_packed(query, packed_seq_params)
        if attention_bias is not None:
            raise NotImplementedError("RingCoreAttention has no attention bias")
        if attention_mask is not None:
            raise ValueError(
                "RingCoreAttention takes no attention_mask tensor: pass None (on the command line "
                "--no-create-attention-mask-in-dataloader), and say masks other than causal with "
                "RingSequenceParams as packed_seq_params"
            )
        mask_type = attn_mask_type or self.attn_mask_type
        sequence, keys = self._sequences(query, key, mask_type, packed_seq_params)
        packed = query.dim() == 3
        q, k, v = (x[None] if packed else x.transpose(0, 1) for x in (query, key, value))
        if self._watches and self.training:
            self._watch(q, k, sequence, keys)
        attend = partial(
            ring_attention,
            *(q, k, v, sequence, keys),
            scale=self.softmax_scale,
            sinks=self.softmax_offset,
            kernel=self.ring.kernel,
            **self._dropout(),
        )
        if self._keeps and self.training:
            out = self.ring.kept.attended(attend, (sequence, keys))
        else:
            out = attend()
        if not packed:
            return out.transpose(0, 1).flatten(2)
        thd = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        # Multi-latent attention puts the batch dimension back in Megatron's own format only.
        return out[0].flatten(1) if thd else out[0, :, None].flatten(2)

    def _watch(
        self, q: Tensor, k: Tensor, sequence: ShardedSequence, keys: ShardedSequence | None
    ) -> None:
        # A recomputation, which runs inside a backward, would find the same again.
        if torch._C._current_graph_task_id() != -1:
            return
        found = max_logits(q, k, sequence, keys, self.softmax_scale).float()
        held = self.current_max_attn_logits
        self.current_max_attn_logits = found if held is None else torch.maximum(held, found)

    def _dropout(self) -> dict[str, Any]:
        """The probability, and a seed that is another for each layer, step and tensor rank."""
        if not self.training or not self.dropout_p:
            return {}
        return {"dropout_p": self.dropout_p, "dropout_seed": next_seed(self.tp_group.rank())}

    def _sequences(
        self, query: Tensor, key: Tensor, mask_type: AttnMaskType, params: PackedSeqParams | None
    ) -> tuple[ShardedSequence, ShardedSequence | None]:
        """Where the queries live and, in cross attention, the keys."""
        ring = self.ring
        if params is not None and params.qkv_format == "thd":
            params = ring.packed(params, rule(mask_type, packed=True))
        if isinstance(params, RingSequenceParams) and params.sequence is not None:
            sequence = params.sequence
            if sequence.topology not in (ring.topology, ring.topology_of(params)):
                raise ValueError(
                    "the sequence in RingSequenceParams lives on another topology than this "
                    "layer's ring: make it with ShardedSequence(seq_len, ring.topology, ...)"
                )
            if self.attention_type == "cross":
                raise NotImplementedError("cross attention has no packed sequences; pass None")
            mask = within(sequence.mask, self.window)
            if mask != sequence.mask:
                sequence = ring.sequence(sequence.seq_len, mask, sequence.topology, sequence.layout)
            return ring.placed(sequence), None
        topology = ring.topology_of(params)
        mask = within(rule(mask_type, packed=False), self.window)
        sequence = ring.placed(ring.sequence(query.shape[0] * topology.size, mask, topology))
        if self.attention_type == "self":
            return sequence, None
        return sequence, ring.placed(ring.sequence(key.shape[0] * topology.size, mask, topology))

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Learnable sinks, split over the tensor ranks, under the name that Megatron gives them."""
        held = self.state_dict(prefix="", keep_vars=True)
        split = {"softmax_offset": 0}
        groups = {"tp_group": self.tp_group, "dp_cp_group": (metadata or {}).get("dp_cp_group")}
        found: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            held, prefix, split, sharded_offsets, **groups
        )
        return found


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
