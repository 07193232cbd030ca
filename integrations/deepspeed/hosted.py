"""Models of transformers under an engine; transformers need not be there for others."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from ring_sp import ProcessGroupManager
from ring_sp.integrations.deepspeed.block import RingBlock
from ring_sp.ulysses import kv_replication

if TYPE_CHECKING:
    from ring_sp.integrations.huggingface import HuggingFaceRing


def check_model(model: nn.Module, block: RingBlock) -> None:
    """Raise NotImplementedError for a model of transformers that cannot ring, ValueError for heads
    that the Ulysses ranks do not divide. It changes nothing.
    """
    parts = list(_of_transformers(model))
    if len(parts) > 1:
        raise NotImplementedError(
            f"{type(model).__name__} holds {len(parts)} models of transformers: give each an "
            f"engine of its own"
        )
    for part in parts:
        from ring_sp.integrations.huggingface.refusals import refuse_model

        refuse_model(part)
        text = part.config.get_text_config()
        heads = text.num_attention_heads
        kv_replication(heads, getattr(text, "num_key_value_heads", None) or heads, block.ulysses)


def switch(model: nn.Module) -> None:
    """Have a model of transformers, itself or inside of `model`, use ring attention, in place."""
    for part in _of_transformers(model):
        from ring_sp.integrations.huggingface import use_ring_attention

        use_ring_attention(part)


def hugging_face_ring(
    model: nn.Module, manager: ProcessGroupManager, block: RingBlock
) -> "HuggingFaceRing | None":
    """The ring of a model of transformers; None for another. Raises ValueError for one that does
    not use ring attention.
    """
    for part in _of_transformers(model):
        from ring_sp.integrations.huggingface import NAME, HuggingFaceRing

        if part.config._attn_implementation != NAME:
            raise ValueError(
                f"{type(part).__name__} has attn_implementation "
                f"{part.config._attn_implementation!r}: call use_ring_attention(model) first"
            )
        return HuggingFaceRing(manager, block.layout, block.kernel)
    return None


def _of_transformers(model: nn.Module) -> Iterator[Any]:
    """The models of transformers in `model`, itself or what it wraps, without their own parts."""
    try:
        from transformers import PreTrainedModel
    except ImportError:
        return
    if isinstance(model, PreTrainedModel):
        yield model
        return
    for child in model.children():
        yield from _of_transformers(child)
