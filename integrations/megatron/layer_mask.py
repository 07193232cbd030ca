"""The mask of one layer: what its type, the batch's documents and the layer's window say."""

from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention

from ring_sp import masks
from ring_sp.masks import Mask

Window = tuple[int | None, int | None]

_MASKS = {AttnMaskType.causal: masks.causal(), AttnMaskType.no_mask: masks.full()}
_IN_DOCUMENTS = {AttnMaskType.padding_causal: masks.causal(), AttnMaskType.padding: masks.full()}
"""Types that speak of padding, which packed documents have between and behind them."""


def window_of(config: TransformerConfig, layer_number: int) -> Window | None:
    """Keys before and after a query that a layer sees, None for no limit; None without a window."""
    skipped = config.window_attn_skip_freq
    if not is_layer_window_attention(config.window_size, skipped, layer_number):
        return None
    left, right = (None if side < 0 else side for side in config.window_size)
    return left, right


def rule(mask_type: AttnMaskType, packed: bool) -> Mask:
    """What an attention mask type lets see. Raises ValueError for one that needs a mask tensor."""
    known = {**_MASKS, **(_IN_DOCUMENTS if packed else {})}
    if mask_type not in known:
        raise ValueError(
            f"RingCoreAttention needs an attn_mask_type of causal or no_mask; got {mask_type}"
        )
    return known[mask_type]


def within(mask: Mask, window: Window | None) -> Mask:
    """What is left of a mask in a window. Raises NotImplementedError for masks that have no such
    form.
    """
    return mask if window is None else masks.windowed(mask, *window)
