"""Rotary angles at the positions that a rank really holds, whatever the layout."""

from typing import Any, NamedTuple

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from ring_sp.integrations.megatron.check import mixes_tokens, require_ring_everywhere
from ring_sp.integrations.megatron.recomputation import keeps
from ring_sp.integrations.megatron.ring import MegatronRing, RingSequenceParams

_TRAINING = "a ring serves training; build the inference model without it"


class Place(NamedTuple):
    """Where the tokens of a batch are, and whether the layer has dropped the batch dimension."""

    params: RingSequenceParams
    flat: bool = False


class RingRotaryEmbedding(nn.Module):
    """Megatron's rotary embedding, plain, scaled or YaRN, asked for the positions of this rank.

    Megatron's own cuts the angles of the whole sequence in zigzag order. The seam is
    `get_rotary_seq_len`, whose result Megatron only hands back to `forward`: here it is the
    batch's sequence itself.
    """

    def __init__(self, stock: RotaryEmbedding, ring: MegatronRing, latent: bool = False) -> None:
        """`latent` for that of a layer with multi-latent attention, which drops the batch dimension
        of packed sequences before it rotates.
        """
        super().__init__()
        self.ring, self.latent = ring, latent
        self.scale: float = 1 / (stock.seq_len_interpolation_factor or 1)
        self.mscale: float | None = None
        """What YaRN multiplies queries and keys with; None for other embeddings."""
        # A plain attribute: Megatron's bf16 models cast every floating-point buffer, and angles in
        # bf16 are off by radians within a few thousand tokens. The marker follows the model.
        self._frequencies: Tensor
        if isinstance(stock, YarnRotaryEmbedding):
            angles, self.mscale = stock.get_emb(2)
            # Angles are linear in the position, and the first is 0.
            self._frequencies = angles[1, 0, 0].float()
        else:
            inverse = stock.inv_freq.float()
            if stock.rotary_interleaved:
                self._frequencies = inverse.repeat_interleave(2)
            else:
                self._frequencies = torch.cat([inverse, inverse])
        self.register_buffer("_marker", torch.empty(0, dtype=torch.int64), persistent=False)

    def get_rotary_seq_len(
        self,
        inference_context: object,
        transformer: Any,
        transformer_input: Tensor | None,
        transformer_config: TransformerConfig,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> Place:
        """The sequence of this batch. Raises NotImplementedError in inference."""
        if inference_context is not None:
            raise NotImplementedError(_TRAINING)
        arriving = transformer.input_tensor if transformer is not None else None
        hidden = transformer_input if arriving is None else arriving
        packed = packed_seq_params is not None
        flat = self.latent and packed and hidden is not None and hidden.shape[1] == 1
        if isinstance(packed_seq_params, RingSequenceParams) and packed_seq_params.sequence:
            return Place(packed_seq_params, flat)
        if packed_seq_params is not None and packed_seq_params.qkv_format == "thd":
            raise ValueError(
                "packed sequences reach the layers of a model with ring positions as "
                "RingSequenceParams: pass ring.packed(packed_seq_params), or the params themselves "
                "to the model that use_ring_positions was given"
            )
        if hidden is None:
            raise ValueError("rotary positions need the input of the transformer block")
        tensor = transformer_config.tensor_model_parallel_size
        local_len = hidden.shape[0] * (tensor if transformer_config.sequence_parallel else 1)
        topology = self.ring.topology_of(packed_seq_params)
        sequence = self.ring.sequence(local_len * topology.size, None, topology)
        return Place(RingSequenceParams(sequence=sequence), flat)

    def forward(self, place: Place, **_: Any) -> Tensor | tuple[Tensor, float]:
        """Angles [local_len, 1, 1, rotary dim] in radians, float32; of YaRN with its factor. Where
        the layer has dropped the batch dimension, so do they.
        """
        frequencies = self._frequencies = self._frequencies.to(self.get_buffer("_marker").device)
        positions = place.params.positions(frequencies.device).float() * self.scale
        angles = torch.outer(positions, frequencies)[:, None]
        angles = angles if place.flat else angles[:, None]
        return angles if self.mscale is None else (angles, self.mscale)


def use_ring_positions(model: MegatronModule, ring: MegatronRing) -> None:
    """Give a model, in place, rotary angles that follow the ring's layout, in its layers too where
    they have their own (multi-latent attention), and packed documents that follow it; tell the
    ring so.

    Models with learned positions are left as they are: their position_ids come with the batch.
    Megatron's packed sequences are then cut as `ring.packed` says, whatever the layout. Raises
    ValueError for a model with an attention layer that is not the ring's, and NotImplementedError
    for multimodal rotary positions, rotary embeddings that the ring does not know, fused rotary
    positions in multi-latent attention, and multi-token prediction where `install` was not called.
    """
    require_ring_everywhere(model, ring)
    kind, config = getattr(model, "position_embedding_type", "none"), model.config
    if kind not in ("rope", "yarn", "learned_absolute", "none"):
        raise NotImplementedError(
            f"the ring has rope, yarn, learned_absolute or no positions; got {kind!r}"
        )
    if config.multi_latent_attention and config.apply_rope_fusion:
        raise NotImplementedError(
            "the ring has no fused rotary positions in multi-latent attention; use "
            "apply_rope_fusion=False (--no-rope-fusion)"
        )
    if config.mtp_num_layers and ring.topology.size > 1 and not ring.rolls_tokens:
        raise NotImplementedError(
            "multi-token prediction shifts tokens in an order of Megatron's own; call "
            "install(options) before the model is built"
        )
    for name, module in list(model.named_modules()):
        stock = getattr(module, "rotary_pos_emb", None)
        if stock is None or isinstance(stock, RingRotaryEmbedding):
            continue
        if type(stock) not in (RotaryEmbedding, YarnRotaryEmbedding):
            raise NotImplementedError(
                f"{name or 'the model'} has rotary positions that the ring does not know: "
                f"{type(stock).__name__}"
            )
        latent = config.multi_latent_attention and module is not model
        module.rotary_pos_emb = RingRotaryEmbedding(stock, ring, latent)
    model.register_forward_pre_hook(_PackedInRing(ring), with_kwargs=True)
    if keeps(config, ring.keep_attention):
        model.register_forward_pre_hook(lambda *_: ring.kept.begin())
    ring.has_positions = True


class _PackedInRing:
    """Before a model's forward: Megatron's packed sequences become the ring's, and inference is
    refused.
    """

    def __init__(self, ring: MegatronRing) -> None:
        self.ring = ring

    def __call__(
        self, model: MegatronModule, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # A model with rotary positions refuses it too where it comes by its place.
        if kwargs.get("inference_context") is not None or kwargs.get("inference_params"):
            raise NotImplementedError(_TRAINING)
        params: PackedSeqParams | None = kwargs.get("packed_seq_params")
        if params is not None and params.qkv_format == "thd":
            mixer = next((name for name, part in model.named_modules() if mixes_tokens(part)), "")
            if mixer:
                raise NotImplementedError(
                    f"{mixer} would mix the tokens of packed documents; train without packing"
                )
            kwargs = {**kwargs, "packed_seq_params": self.ring.packed(params)}
        return args, kwargs
