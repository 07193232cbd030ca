"""Trade heads for sequence between the peers of a Ulysses group (arXiv:2309.14509),
differentiably.
"""

from math import gcd
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ring_sp.ring import Axis


def kv_replication(heads: int, kv_heads: int, size: int) -> int:
    """How often each key head is repeated so that `size` peers get whole groups of query heads.

    1 where the peers divide the key heads. Raises ValueError where they do not divide the query
    heads.
    """
    if heads % size:
        raise ValueError(
            f"Ulysses over {size} ranks needs a number of query heads that {size} divides; "
            f"got {heads}. Use fewer Ulysses ranks and a longer ring."
        )
    return size // gcd(kv_heads, size)


def to_heads(x: Tensor, peers: Axis, lens: tuple[int, ...]) -> Tensor:
    """[B, own len, H, D] -> [B, sum of lens, H / peers, D]: all tokens of the peers, this peer's
    heads.

    `lens` are the peers' tokens in order; tokens come out in that order.
    """
    return x if peers.size == 1 else _Trade.apply(x, peers, lens, True)


def to_sequence(x: Tensor, peers: Axis, lens: tuple[int, ...]) -> Tensor:
    """[B, sum of lens, H / peers, D] -> [B, own len, H, D]: the inverse of `to_heads`."""
    return x if peers.size == 1 else _Trade.apply(x, peers, lens, False)


class _Trade(torch.autograd.Function):
    """An all-to-all is its own transpose, in the other direction."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Axis, lens: tuple[int, ...], heads_out: bool) -> Tensor:
        ctx.place = peers, lens, heads_out
        return _gather_sequence(x, peers, lens) if heads_out else _gather_heads(x, peers, lens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        peers, lens, heads_out = ctx.place
        return _Trade.apply(grads[0], peers, lens, not heads_out), None, None, None


def _gather_sequence(x: Tensor, peers: Axis, lens: tuple[int, ...]) -> Tensor:
    sent = x.unflatten(2, (peers.size, -1)).permute(2, 1, 0, 3, 4).contiguous()
    own_len, shape = x.shape[1], sent.shape[2:]
    received = x.new_empty(sum(lens), *shape)
    dist.all_to_all_single(
        received, sent.flatten(0, 1), list(lens), [own_len] * peers.size, group=peers.group
    )
    return received.transpose(0, 1).contiguous()


def _gather_heads(x: Tensor, peers: Axis, lens: tuple[int, ...]) -> Tensor:
    sent, own_len = x.transpose(0, 1).contiguous(), lens[peers.rank]
    received = x.new_empty(peers.size * own_len, *sent.shape[1:])
    dist.all_to_all_single(received, sent, [own_len] * peers.size, list(lens), group=peers.group)
    return (
        received.unflatten(0, (peers.size, own_len))
        .permute(2, 1, 0, 3, 4)
        .flatten(2, 3)
        .contiguous()
    )
