"""What of a Hugging Face model a ring cannot do, said before anything is computed."""

from collections.abc import Iterator
from typing import Any

from torch import nn

LAYER_TYPES = ("full_attention", "sliding_attention")
"""Kinds of layers, of the config's `layer_types`, that a ring can do."""
ROPE_TYPES = ("dynamic", "longrope")
"""Rotary embeddings that follow the longest position they see, which is another on each rank."""
MIXERS = ("Mamba", "DeltaNet", "Rwkv", "Recurrent", "ShortConv", "Indexer", "LightningAttention")
"""In the names of modules that mix tokens outside of attention, or choose keys for it."""


def refuse_config(config: Any) -> None:
    """Raise NotImplementedError for a model config with layers that cannot ring."""
    if found := sorted(set(_of_config(config))):
        raise NotImplementedError(
            f"ring attention has no {'; no '.join(found)}: its tokens would meet only those of one "
            f"rank. Use another model, or an attention that is not spread over ranks."
        )


def refuse_model(model: nn.Module) -> None:
    """Raise NotImplementedError for a model with layers that cannot ring."""
    refuse_config(model.config)
    found = {
        f"{type(module).__name__} ({name})"
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv1d | nn.RNNBase)
        or any(mixer in type(module).__name__ for mixer in MIXERS)
    }
    if found:
        raise NotImplementedError(
            f"ring attention serves models whose tokens meet in attention alone; this one has "
            f"{', '.join(sorted(found)[:4])}"
        )
    if any(hasattr(module, "create_position_ids_from_input_ids") for module in model.modules()):
        raise NotImplementedError(
            f"{type(model).__name__} counts positions from behind its padding token, as RoBERTa; a "
            f"ring counts them from 0"
        )


def _of_config(config: Any) -> Iterator[str]:
    text = config.get_text_config()
    for layer_type in getattr(text, "layer_types", None) or ():
        if layer_type not in LAYER_TYPES:
            yield f"{layer_type} layers"
    if getattr(text, "index_topk", None) is not None:
        yield "sparse attention with an index (index_topk)"
    if getattr(config, "is_encoder_decoder", False):
        yield "encoder and decoder in one model (is_encoder_decoder)"
    rope = getattr(text, "rope_parameters", None) or {}
    for entry in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if entry.get("rope_type") in ROPE_TYPES:
            yield f"rotary embedding of rope_type {entry['rope_type']!r}"
