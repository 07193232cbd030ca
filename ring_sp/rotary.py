"""Rotary position embedding by global position (arXiv:2104.09864, section 3.4.2)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ring_sp.kernels.contract import accumulation_dtype
from ring_sp.sequence import ShardedSequence
from ring_sp.tokenwise import pieces

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
    found: Tensor = _turned(x, *by) if torch.compiler.is_compiling() else _Rotate.apply(x, *by)
    return found


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _by_pieces(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _by_pieces(dout, cos, -sin), None, None


def _by_pieces(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`_turned`, which is in the dtype of the rotation for a piece of the tokens at a time."""
    out, at = torch.empty(x.shape, dtype=x.dtype, device=x.device), 0
    for part, into in zip(pieces(x), pieces(out), strict=True):
        rows = slice(at, at + part.shape[1])
        into.copy_(_turned(part, cos[rows], sin[rows]))
        at = rows.stop
    return out


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.to(cos.dtype).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
