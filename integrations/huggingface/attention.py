"""The attention function and mask function that transformers' interfaces take."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import or_masks

from ring_sp import ring_attention
from ring_sp.integrations.huggingface.refusals import refuse_config
from ring_sp.integrations.huggingface.ring import RingContext
from ring_sp.masks import Mask, causal

PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


class Window(int):
    """In place of a sliding window's mask: the keys that a query sees, its own included."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Window | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """A layer's attention over the ring of the batch's `ring_sp`.

    query is [B, H, local_len, D], key and value [B, Hkv, local_len, D]; returns [B, local_len, H,
    Dv], and no weights. Of `options` it follows scaling, sliding_window, softcap, s_aux, dropout
    and is_causal; under torch.autocast it computes in that dtype. Collective over the ring. Raises
    ValueError without `ring_sp`, and for a mask or options that belong into
    `HuggingFaceRing.batch`; NotImplementedError for a bias on the scores and for attention weights.
    """
    context = _context(module, options)
    if isinstance(attention_mask, Window):
        # Some layers know their window by the mask alone.
        options["sliding_window"] = options.get("sliding_window") or attention_mask
        attention_mask = None
    _refuse_options(module, attention_mask, options)
    _require_same_direction(module, context.sequence.mask, options)
    dropout: float = options.get("dropout") or 0.0
    query, key, value = _autocast(query, key, value)
    out = ring_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        context.windowed(options.get("sliding_window")),
        scale=options.get("scaling"),
        softcap=options.get("softcap"),
        sinks=options.get("s_aux"),
        dropout_p=dropout,
        dropout_seed=context.seed(module) if dropout else None,
        kernel=context.ring.kernel,
    )
    return out.contiguous(), None


def mask_of(
    *,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    config: Any = None,
    use_vmap: bool = False,
    local_size: int | None = None,
    **_: Any,
) -> Tensor | Window | None:
    """No mask tensor: the layers know the sequence. A window goes on to `attend`, as does a 2-D
    mask, which it refuses.

    transformers calls it before the first layer. Raises NotImplementedError for models that
    cannot ring, and masks of a model's own, such as blocks of an image.
    """
    if config is not None:
        refuse_config(config)
    joined = getattr(mask_function, "__qualname__", "").startswith(f"{or_masks.__name__}.")
    if use_vmap or joined:
        raise NotImplementedError(
            "the model adds to the causal mask by itself (such as blocks that see each other), "
            "which ring attention cannot tell: give it text alone"
        )
    if attention_mask is None and local_size is not None:
        return Window(local_size)
    return attention_mask


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In the dtype of torch.autocast, as torch's own attention: rotary embeddings and norms leave
    queries and keys in fp32, and values are not.
    """
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device_type)) for x in tensors)


def _context(module: nn.Module, options: dict[str, Any]) -> RingContext:
    context = options.get("ring_sp")
    if not isinstance(context, RingContext):
        raise ValueError(
            f"{type(module).__name__} has attn_implementation 'ring_sp' and needs the batch's "
            f"sequence; got ring_sp={context!r}. Call model(**ring.batch(batch).inputs); to "
            f"evaluate or generate in one process, use `with local_attention(model):`; for parts "
            f"that do not ring, set_attn_implementation({{'text_config': 'ring_sp'}}). A model "
            f"that does not hand keyword arguments on to its layers cannot ring."
        )
    return context


def _refuse_options(
    module: nn.Module, attention_mask: Tensor | None, options: dict[str, Any]
) -> None:
    if attention_mask is not None:
        raise ValueError(
            f"{type(module).__name__} got an attention mask {tuple(attention_mask.shape)}, and a "
            f"ring takes no mask tensors: give attention_mask [B, S] to ring.batch and not to the "
            f"model"
        )
    if packing := [name for name in PACKING if options.get(name) is not None]:
        raise ValueError(f"give {', '.join(packing)} to ring.batch and not to the model")
    for name in ("position_bias", "output_attentions"):
        if options.get(name) is not None and options[name] is not False:
            raise NotImplementedError(f"ring attention has no {name}")


def _require_same_direction(module: nn.Module, mask: Mask, options: dict[str, Any]) -> None:
    """A layer that looks ahead needs a mask that lets it, and none with a window is known."""
    forward = options.get("is_causal")
    if forward is None:
        forward = getattr(module, "is_causal", True)
    if forward:
        return
    if options.get("sliding_window") is not None:
        raise NotImplementedError(
            f"{type(module).__name__} is bidirectional and has a sliding window; a ring has such "
            f"windows only in causal layers"
        )
    if causal() in (mask, *mask.args):
        raise ValueError(
            f"{type(module).__name__} is bidirectional; say ring.batch(batch, inner=masks.full())"
        )
