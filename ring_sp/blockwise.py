"""Feed-forward by chunks of tokens (arXiv:2305.19370, arXiv:2310.01889 section 3)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from ring_sp.kernels.contract import accumulation_dtype


def blockwise(
    fn: Callable[..., Tensor], x: Tensor, chunk: int, dim: int = 1, weights: Sequence[Tensor] = ()
) -> Tensor:
    """fn(x, *weights), computed `chunk` tokens at a time and again in backward, so that what `fn`
    keeps for its backward is that of one chunk.

    x [B, S, ...] with tokens along `dim`; `fn` treats tokens alone, as feed-forward, norm and
    residual do, and keeps their number. The last chunk may be shorter. Gradients are those of
    fn(x), and reach a weight, and what its host hung on it, once. Those of `weights` are summed
    over the chunks in float32; those of others, which `fn` knows itself, in their own dtype: in
    bf16 they were 1.8e-3 off for a whole of 4,096 tokens, 5.3e-3 for 16 chunks and 1.8e-2 for 256.
    Dropout draws the same in backward. Besides x and the result there is memory for one more of
    each. In a checkpoint without reentrance that ends with it `fn` runs twice, as it does without;
    in others three times. Raises ValueError for a chunk below 1, or an `fn` that returns another
    number of tokens.
    """
    if chunk < 1:
        raise ValueError(f"chunk is a number of tokens, at least 1; got {chunk}")

    def run(part: Tensor, *weights: Tensor) -> Tensor:
        out = fn(part.contiguous(), *weights)  # Some take views of it, as GPT-2's.
        if not isinstance(out, Tensor) or not out.shape or out.shape[dim] != part.shape[dim]:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out)
            raise ValueError(
                f"fn must return a tensor with the tokens that it gets, {part.shape[dim]} along "
                f"dim {dim}; got {got} for {tuple(part.shape)}"
            )
        return out

    if not torch.is_grad_enabled():
        return torch.cat([run(part, *weights) for part in x.split(chunk, dim)], dim)
    again, sums = partial(checkpoint, use_reentrant=False), [_sum(weight) for weight in weights]

    def summed(part: Tensor) -> Tensor:
        own = [_Part.apply(y, w.detach()) for y, w in zip(sums, weights, strict=True)]
        return run(part, *own)

    if torch.compiler.is_compiling():
        return torch.cat([again(summed, part) for part in x.split(chunk, dim)], dim)
    chunks = _Chunks(x, chunk, dim)
    # An empty tensor tells torch of which device the random numbers are.
    anchor = x.new_empty(0)
    with saved_tensors_hooks(_itself, _itself):
        # A checkpoint around this would run `fn` until it has each chunk's anchor.
        parts = [again(lambda at, _: summed(chunks.take(at)), n, anchor) for n in chunks.numbers]
    return torch.cat(parts, dim)


class _Chunks:
    """The chunks of x: views of it at first, and in backward of what autograd gives back for it.

    Autograd is given x once, before `fn` runs: a checkpoint around this has then all that it needs,
    and does not run `fn` to get there.
    """

    def __init__(self, x: Tensor, chunk: int, dim: int) -> None:
        self._first = dict(enumerate(x.split(chunk, dim)))
        self.numbers = range(len(self._first))
        self._chunk, self._dim = chunk, dim
        self._trained = x.requires_grad
        anchor = torch.empty(0, requires_grad=True)
        # Its node alone would not live on before torch 2.13.
        self._saved: Any = _Save.apply(anchor, x)
        self._again: dict[int, Tensor] = {}

    def take(self, at: int) -> Tensor:
        if at in self._first:
            return self._first.pop(at)
        if at not in self._again:
            # A checkpoint gives it once a backward.
            (x,) = self._saved.grad_fn.saved_tensors
            self._again = dict(enumerate(x.detach().split(self._chunk, self._dim)))
        return self._again.pop(at).requires_grad_(self._trained)


class _Save(torch.autograd.Function):
    """Keeps a tensor, as autograd does; what it gives is of no use."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return anchor.clone()


def _itself(x: Tensor) -> Tensor:
    return x


def _sum(weight: Tensor) -> Tensor:
    total: Tensor = _Sum.apply(weight)
    return total


class _Sum(torch.autograd.Function):
    """A float32 stand-in for a weight, without memory: its gradients are summed as they are."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return weight.new_empty((), dtype=accumulation_dtype(weight.dtype)).expand(weight.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.to(ctx.dtype)


class _Part(torch.autograd.Function):
    """The weight itself, for one chunk; its gradient goes to the stand-in."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, weight: Tensor) -> Tensor:
        ctx.dtype = total.dtype
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None
