"""The last linear layer and its cross entropy by chunks of tokens: logits are never whole."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ring_sp.kernels.contract import accumulation_dtype
from ring_sp.layout import whole_number
from ring_sp.loss import IGNORE, mean_of_sums

LOGITS = 1 << 28
"""Most logits held at a time, 1 GiB of float32: chunks of 2,048 tokens for 128k words."""


@dataclass(frozen=True)
class LinearLoss:
    """What else a loss has. `softcap` c makes c * tanh(logits / c) of logits; `z_loss` adds that
    many times lse^2 to each token's loss (arXiv:2204.02311 section 5); over `vocab_group` the
    vocabulary is split, in equal parts in the order of its ranks; `chunk` is in tokens, by default
    as many as keep `LOGITS`, on which a `vocab_group` agrees, and the host waits for it. Raises
    ValueError for numbers that make no sense.
    """

    softcap: float | None = None
    z_loss: float = 0.0
    vocab_group: dist.ProcessGroup | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be positive, or None; got {self.softcap}")
        if not self.z_loss >= 0:
            raise ValueError(f"z_loss must be 0 or more; got {self.z_loss}")
        if self.chunk is not None and whole_number("chunk", self.chunk) < 1:
            raise ValueError(f"chunk is a number of tokens, at least 1; got {self.chunk}")


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    averaged_over: int = 1,
    count: Tensor | None = None,
    options: LinearLoss | None = None,
) -> Tensor:
    """The mean cross entropy of x @ weight.T against labels, of all tokens on all ranks of `group`.

    x [..., E], labels int64 [...] with `loss.IGNORE` where there is no loss, weight [V, E] with the
    words of this rank, in x's dtype; autocast rounds both to its own. The value is float32 (float64
    for float64), the same on every rank; `group`, `averaged_over` and `count` are those of
    `loss.token_mean`. The gradients of x and weight are made along with it, from logits in float32,
    weight's summed in float32; backward scales them, can be called once and has no derivative
    itself. A label that is no word gives NaN, and so does a vocabulary in unequal parts. On CUDA
    bfloat16 and float16 need torch 2.8. Collective over `group` and `options.vocab_group`. Raises
    ValueError for shapes and dtypes that do not fit.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and torch.float64 not in (x.dtype, weight.dtype):
        x, weight = (each.to(torch.get_autocast_dtype(kind)) for each in (x, weight))
    matrix = weight.dim() == 2 and weight.numel() > 0
    if labels.shape != x.shape[:-1] or not matrix or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"x [..., E], weight [V, E], not empty, and labels [...] must fit; got "
            f"{tuple(x.shape)}, {tuple(weight.shape)} and {tuple(labels.shape)}"
        )
    if labels.dtype != torch.int64 or x.dtype != weight.dtype:
        raise ValueError(
            f"labels must be int64, x and weight of one dtype; got {labels.dtype}, {x.dtype} and "
            f"{weight.dtype}"
        )
    x, labels = x.reshape(-1, x.shape[-1]), labels.flatten()
    if not torch.is_grad_enabled():
        # `needs_input_grad` knows tensors and not the mode: gradients would be made all the same.
        x, weight = x.detach(), weight.detach()
    with torch.autocast(kind, enabled=False):  # It would round logits and softmax too.
        total = _LinearLoss.apply(x, weight, labels, options or LinearLoss())
    return mean_of_sums(total, (labels != IGNORE).sum(), group, averaged_over, count)


class _LinearLoss(torch.autograd.Function):
    """The sum over x [N, E]; keeps its gradients, dx in x's dtype and dweight in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, options: LinearLoss) -> Tensor:
        wide = accumulation_dtype(x.dtype)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        total = x.new_zeros((), dtype=wide)
        chunk = options.chunk or _chunk_len(weight, options.vocab_group)
        for start in range(0, x.shape[0], chunk):
            at = slice(start, start + chunk)
            found, dlogits = _chunk(x[at], weight, labels[at], options)
            # Compiled by torch 2.11, a result that is added to in place has gradients of zero.
            total = total + found
            if dx is not None:
                dtype = wide if options.vocab_group else x.dtype
                dx[at] = _summed(_product(dlogits, weight, dtype), options.vocab_group)
            if dweight is not None:
                _add_product(dweight, dlogits, x[at])
            del dlogits  # Or it would lie beside the next chunk's logits.
        ctx.gradients = dx, dweight
        ctx.dtype = x.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        if torch.is_grad_enabled():
            raise NotImplementedError("linear_cross_entropy has no second derivative")
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy gives its gradients once: call it again")
        (dx, dweight), ctx.gradients = ctx.gradients, None
        if dx is not None:
            # The factor may be too small for float16; a float32 dx as a whole would take too much.
            for part in dx.split(max(1, LOGITS // dx.shape[1])):
                part.copy_(part.to(grads[0].dtype) * grads[0])
        if dweight is not None:
            dweight = dweight.mul_(grads[0]).to(ctx.dtype)
        return dx, dweight, None, None


def _chunk_len(weight: Tensor, group: dist.ProcessGroup | None) -> int:
    """Tokens of `LOGITS`, as many on each rank: those with more words would wait for messages that
    nobody sends, before they could give NaN.
    """
    words = weight.shape[0]
    if group is not None:
        most = torch.tensor(words, device=weight.device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group)
        words = int(most)
    return max(1, LOGITS // words)


def _chunk(x: Tensor, weight: Tensor, labels: Tensor, options: LinearLoss) -> tuple[Tensor, Tensor]:
    """The sum of some tokens' losses, and its gradient to their logits in x's dtype."""
    group, cap = options.vocab_group, options.softcap
    logits = _product(x, weight.mT, accumulation_dtype(x.dtype))
    if cap is not None:
        logits = logits.div_(cap).tanh_().mul_(cap)
    top = logits.amax(-1, keepdim=True)
    if group is not None:
        dist.all_reduce(top, dist.ReduceOp.MAX, group)
    words = weight.shape[0]
    place = labels[:, None] - (group.rank() * words if group else 0)
    mine = (place >= 0) & (place < words)
    place = place.clamp(0, words - 1)
    slope = None if cap is None else (logits / cap).square_().neg_().add_(1)
    logits -= top
    target = logits.gather(1, place).masked_fill_(~mine, 0)
    weights = logits.exp_()
    parts = weights.sum(-1, keepdim=True), target, mine, torch.full_like(target, words)
    known = _summed(torch.cat([part.to(target.dtype) for part in parts], 1), group)
    sums, target, found, all_words = known.split(1, 1)
    wrong = (found == 0) | (all_words != words * (group.size() if group else 1))
    counted = labels[:, None] != IGNORE
    lse = top + sums.log()
    losses = sums.log() - target + options.z_loss * lse.square()
    losses = losses.masked_fill_(wrong, torch.nan).masked_fill_(~counted, 0)
    weights *= (1 + 2 * options.z_loss * lse) / sums * counted
    weights.scatter_add_(1, place, -(mine & counted).to(weights.dtype))
    if slope is not None:
        weights *= slope
    return losses.sum(), weights.to(x.dtype)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, summed in float32 at least and rounded once to `dtype`."""
    if a.dtype == dtype:
        return a @ b
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else a.to(dtype) @ b.to(dtype)


def _add_product(dweight: Tensor, dlogits: Tensor, x: Tensor) -> None:
    """dweight += dlogits.T @ x, of some words at a time: the product would be another dweight."""
    words = max(1, LOGITS // 16 // x.shape[1])
    for into, some in zip(dweight.split(words), dlogits.split(words, 1), strict=True):
        into.add_(_product(some.mT, x, dweight.dtype))


def _summed(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None:
        dist.all_reduce(x, group=group)
    return x
