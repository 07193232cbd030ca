"""Next-token labels and the mean loss of a sequence whose tokens lie on several ranks."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from ring_sp.kernels.contract import accumulation_dtype
from ring_sp.masks import documents

IGNORE = -100
"""Label of a token that has no loss."""


def shift_labels(tokens: Tensor, cu_seqlens: Sequence[int] | None = None) -> Tensor:
    """The next token of each token, [B, S] -> [B, S]; `IGNORE` for the last of the sequence.

    Call it on whole sequences, before they are sharded: the next token may live on another rank.
    With `cu_seqlens`, as for `masks.documents`, the last token of each document and the padding
    after the last are ignored too. Raises ValueError for tokens of a type that cannot hold
    `IGNORE`, or cu_seqlens beyond the sequence.
    """
    if tokens.dtype not in (torch.int16, torch.int32, torch.int64):
        raise ValueError(f"tokens must be int16, int32 or int64; got {tokens.dtype}")
    if tokens.dim() != 2:
        raise ValueError(f"tokens must be [batch, tokens]; got shape {tuple(tokens.shape)}")
    if cu_seqlens is not None:
        end = documents(cu_seqlens).min_len
        if end > tokens.shape[1]:
            raise ValueError(f"cu_seqlens end at {end}, tokens at {tokens.shape[1]}")
    labels = torch.roll(tokens, -1, dims=1)
    labels[:, -1] = IGNORE
    if cu_seqlens is not None:
        ends = torch.as_tensor(cu_seqlens, device=tokens.device)[1:] - 1
        labels[:, ends[ends >= 0]] = IGNORE
        labels[:, end:] = IGNORE
    return labels


def token_mean(
    losses: Tensor,
    counted: Tensor,
    group: dist.ProcessGroup | None = None,
    averaged_over: int = 1,
    count: Tensor | None = None,
) -> Tensor:
    """The mean of `losses` over the tokens that are `counted`, on all ranks of `group` together.

    losses and counted (bool) have one shape, this rank's tokens; ValueError if not. Every rank gets
    the same value, 0 where nothing is counted at all. The gradient on a rank is that of its own
    tokens, so that the sum over ranks is the gradient of the mean, however unevenly the counted
    tokens lie.
    `averaged_over` is the number of ranks over which the host averages gradients afterwards (1
    where it sums them); it scales the gradient and not the value. Where gradients accumulate over
    several batches, `count` is the number of counted tokens of all of them on all ranks, and the
    results add up to the mean. `group` None is one process. Collective over `group`.
    """
    if losses.shape != counted.shape or counted.dtype != torch.bool:
        raise ValueError(
            f"losses and counted must have one shape, counted bool; got {list(losses.shape)} and "
            f"{list(counted.shape)} {counted.dtype}"
        )
    total = losses.to(accumulation_dtype(losses.dtype)).masked_fill(~counted, 0).sum()
    return mean_of_sums(total, counted.sum(), group, averaged_over, count)


def mean_of_sums(
    total: Tensor,
    number: Tensor,
    group: dist.ProcessGroup | None = None,
    averaged_over: int = 1,
    count: Tensor | None = None,
) -> Tensor:
    """`token_mean` of this rank's `number` losses, of which `total` is the sum; both scalars."""
    sums = torch.stack([total.detach().double(), number.double()])
    if group is not None:
        dist.all_reduce(sums, group=group)
    whole, found = sums
    count = (found if count is None else torch.as_tensor(count)).clamp_min(1)
    return _Mean.apply(total, whole, count, averaged_over)


def cross_entropy_mean(
    logits: Tensor,
    shift_labels: Tensor | None,
    group: dist.ProcessGroup | None = None,
    averaged_over: int = 1,
    count: Tensor | None = None,
) -> Tensor:
    """`token_mean` of the cross entropy, over the tokens whose label is not `IGNORE`.

    logits [B, S, V] and shift_labels int64 [B, S] are of this rank's tokens; ValueError if they are
    not of the same, or missing. Computed in float32 at least. The rest as in `token_mean`.
    """
    if shift_labels is None:
        raise ValueError("a loss needs labels: give them in the batch before it is cut")
    if logits.shape[:-1] != shift_labels.shape:
        raise ValueError(
            f"logits [B, S, V] and shift_labels [B, S] must speak of the same tokens; got "
            f"{tuple(logits.shape)} and {tuple(shift_labels.shape)}. Keep logits_to_keep at 0."
        )
    wide = logits.to(accumulation_dtype(logits.dtype)).flatten(0, -2)
    labels = shift_labels.flatten()
    losses = functional.cross_entropy(wide, labels, ignore_index=IGNORE, reduction="none")
    return token_mean(losses, labels != IGNORE, group, averaged_over, count)


class _Mean(torch.autograd.Function):
    """`whole` / `count`, with the gradient that `total`, a part of `whole`, has in it."""

    @staticmethod
    def forward(
        ctx: Any, total: Tensor, whole: Tensor, count: Tensor, averaged_over: int
    ) -> Tensor:
        ctx.count, ctx.averaged_over = count, averaged_over
        # A copy: compiled by torch 2.11, what `to` returns as it came has gradients of zero.
        return (whole / count).to(total.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0] * ctx.averaged_over / ctx.count.to(grads[0].dtype), None, None, None
