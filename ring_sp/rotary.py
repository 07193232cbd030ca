"""Rotary position embedding by global position (arXiv:2104.09864, section 3.4.2)."""

import torch
from torch import Tensor

from ring_sp.kernels.contract import accumulation_dtype
from ring_sp.sequence import ShardedSequence

Rotation = tuple[Tensor, Tensor]
"""(cos, sin) of the angles of each token, both [S, 1, D / 2]."""


def rotation(
    sequence: ShardedSequence, like: Tensor, head_dim: int, base: float | None
) -> Rotation | None:
    """The rotation of this rank's tokens: pair d of head_dim / 2 turns by position * base ** (-2 d
    / head_dim) radians. On the device of `like`, in float32, or float64 where `like` is float64;
    None for `base` None.
    """
    if base is None:
        return None
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=like.device)
    positions = sequence.positions(like.device)[:, None, None]
    # float64: near position 10**6 an angle in float32 is off by up to 0.06 radians.
    angles = positions.double() * base ** (-exponents / head_dim)
    dtype = accumulation_dtype(like.dtype)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """x [B, S, H, D] with dimensions d and d + D / 2 rotated as a pair, computed in the dtype of
    the rotation and returned in that of x.
    """
    cos, sin = by
    first, second = x.to(cos.dtype).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
