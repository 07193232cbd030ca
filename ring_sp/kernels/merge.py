"""Join attention over two sets of keys (arXiv:2310.01889, section 3; Milakov and Gimelshein,
arXiv:1805.02867).
"""

import torch
from torch import Tensor


def merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the results over each.

    outs [B, S, H, Dv], lses [B, H, S] in natural log. Associative and commutative, with identity
    (0, -inf): rows that saw nothing on either side stay zero, with lse = -inf.
    """
    joint = torch.logaddexp(lse, other_lse)
    floor = joint.clamp_min(torch.finfo(joint.dtype).min)
    return out * weight(lse - floor) + other_out * weight(other_lse - floor), joint


def weight(log_weight: Tensor) -> Tensor:
    """exp of [B, H, S], shaped to scale [B, S, H, D]."""
    return log_weight.exp().transpose(1, 2).unsqueeze(-1)
