"""A decoder's functions of single tokens, in as little memory as they can do with.

What they compute in float32 is of a piece of the tokens at a time, and they keep no more for
backward than what they are given. The compiler gets the plain formulas, which it fuses.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ring_sp.kernels.contract import accumulation_dtype

PIECE = 1 << 24
"""Most elements that are in float32 at a time, 64 MiB; fewer would start kernels too small."""


def pieces(x: Tensor) -> tuple[Tensor, ...]:
    """x [B, S, ...] by tokens: views of `PIECE` elements or fewer."""
    return x.split(max(1, PIECE * x.shape[1] // max(x.numel(), 1)), 1)


class RMSNorm(nn.RMSNorm):
    """torch's, with a weight, of x [B, S, dim]. Keeps x alone, and no copy of it in float32."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(x)
        found: Tensor = _RMSNorm.apply(x, self.weight, self.eps)
        return found


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        out = torch.empty_like(x)
        for part, into in zip(pieces(x), pieces(out), strict=True):
            into.copy_(functional.rms_norm(part, weight.shape, weight, eps))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        dx, weight = torch.empty_like(x), weight.detach().requires_grad_()
        dweight = torch.zeros_like(weight, dtype=accumulation_dtype(weight.dtype))
        for part, grad, into in zip(*map(pieces, (x, dout, dx)), strict=True):
            with torch.enable_grad():
                given = part.detach().requires_grad_()
                out = functional.rms_norm(given, weight.shape, weight, ctx.eps)
            found, own = torch.autograd.grad(out, (given, weight), grad)
            into.copy_(found)
            dweight += own
        return dx, dweight.to(weight.dtype), None


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up of x [..., 2 * width], its gates first (arXiv:2002.05202). Keeps x alone."""
    if torch.compiler.is_compiling():
        gate, up = x.chunk(2, -1)
        return functional.silu(gate) * up
    found: Tensor = _SwiGLU.apply(x)
    return found


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, -1)
        return functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        (gate, up), (dgate, dup) = x.chunk(2, -1), dx.chunk(2, -1)
        work = functional.silu(gate)
        torch.mul(dout, work, out=dup)
        torch.mul(dout, up, out=work)
        torch.ops.aten.silu_backward(work, gate, grad_input=dgate)
        return dx
