"""Rotary angles at the positions that a rank really holds, whatever the layout."""

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from ring_sp import ShardedSequence, masks
from ring_sp.integrations.megatron.ring import MegatronRing, RingSequenceParams


class RingRotaryEmbedding(nn.Module):
    """Megatron's rotary embedding, asked for the positions of this rank.

    Megatron's own cuts the angles of the whole sequence in zigzag order. The seam is
    `get_rotary_seq_len`, whose result Megatron only hands back to `forward`: here it is the
    sequence itself.
    """

    def __init__(self, stock: RotaryEmbedding, ring: MegatronRing) -> None:
        super().__init__()
        self.ring = ring
        self.interleaved: bool = stock.rotary_interleaved
        self.scale: float = 1 / (stock.seq_len_interpolation_factor or 1)
        # A plain attribute: Megatron's bf16 models cast every floating-point buffer, and angles in
        # bf16 are off by radians within a few thousand tokens. The marker follows the model.
        self._frequencies = stock.inv_freq.float()
        self.register_buffer("_marker", torch.empty(0, dtype=torch.int64), persistent=False)

    def get_rotary_seq_len(
        self,
        inference_context: object,
        transformer: Any,
        transformer_input: Tensor | None,
        transformer_config: TransformerConfig,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> ShardedSequence:
        """The sequence of this batch. Raises NotImplementedError in inference."""
        if inference_context is not None:
            raise NotImplementedError(
                "a ring serves training; build the inference model without it"
            )
        if isinstance(packed_seq_params, RingSequenceParams) and packed_seq_params.sequence:
            return packed_seq_params.sequence
        arriving = transformer.input_tensor if transformer is not None else None
        hidden = transformer_input if arriving is None else arriving
        if hidden is None:
            raise ValueError("rotary positions need the input of the transformer block")
        tensor = transformer_config.tensor_model_parallel_size
        local_len = hidden.shape[0] * (tensor if transformer_config.sequence_parallel else 1)
        return self.ring.sequence(local_len * self.ring.topology.size, masks.causal())

    def forward(self, sequence: ShardedSequence, **_: Any) -> Tensor:
        """Angles [local_len, 1, 1, rotary dim] in radians, float32."""
        frequencies = self._frequencies = self._frequencies.to(self.get_buffer("_marker").device)
        positions = sequence.positions(frequencies.device).float() * self.scale
        angles = torch.outer(positions, frequencies)
        if self.interleaved:
            angles = angles.repeat_interleave(2, dim=1)
        else:
            angles = torch.cat([angles, angles], dim=1)
        return angles[:, None, None]


def use_ring_positions(model: GPTModel, ring: MegatronRing) -> None:
    """Give a model, in place, rotary angles that follow the ring's layout, and tell the ring so.

    Models with learned positions are left as they are: their position_ids come with the batch,
    `sequence.positions`. Raises NotImplementedError for YaRN, multimodal rotary positions,
    multi-latent attention, and multi-token prediction.
    """
    kind, config = model.position_embedding_type, model.config
    if config.multi_latent_attention or kind not in ("rope", "learned_absolute", "none"):
        raise NotImplementedError(
            f"the ring has rope, learned_absolute or no positions; got {kind!r}"
            f"{' with multi-latent attention' if config.multi_latent_attention else ''}"
        )
    if config.mtp_num_layers:
        raise NotImplementedError("multi-token prediction rolls tokens in Megatron's own layout")
    if kind == "rope":
        model.rotary_pos_emb = RingRotaryEmbedding(model.rotary_pos_emb, ring)
    ring.has_positions = True
