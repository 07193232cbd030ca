"""What a pass round the ring holds."""

import sys
from collections.abc import Callable
from typing import Any
from unittest import mock
from weakref import ref

import pytest
import torch
import torch.distributed as dist
from conftest import World
from counted import Counted
from ranks import groups, sequence
from torch import Tensor

from ring_sp import ShardedSequence, masks, passes, ring_attention
from ring_sp.kernels import KERNELS
from ring_sp.kernels.contract import Rows
from ring_sp.passes import Setting, Wire


def held_after_it_was_sent() -> list[bool]:
    """Whether the message of this rank's own queries is still there in each visit to others'."""
    seq = sequence({"ring": 3}, 37)
    q, k, v = (torch.randn(1, seq.local_len, 2, 8, requires_grad=True) for _ in range(3))
    out, made, alive = ring_attention(q, k, v, seq, kernel="reference"), [], []
    join, backward = passes.QueryWire.join, KERNELS["reference"].backward

    def joined(*given: Any) -> Tensor:
        message = join(*given)
        made.append(ref(message))
        return message

    def visited(*given: Any) -> Tensor:
        alive.append(made[0]() is not None)
        return backward(*given)

    with (
        mock.patch.object(passes.QueryWire, "join", joined),
        mock.patch.object(KERNELS["reference"], "backward", visited),
    ):
        torch.autograd.grad(out.sum(), (q, k, v))
    return alive[1:]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="a caller holds what it has given")
def test_a_message_that_nobody_else_keeps_goes_once_it_is_sent(
    world: Callable[[int], World],
) -> None:
    assert world(3).run(held_after_it_was_sent) == [[False, False]] * 3


def most_bytes(kv_heads: int) -> tuple[int, int]:
    """Most bytes that tensors of this rank have, in a forward and in the backward after it, where
    every rank visits 16 keys of every other.
    """
    size = dist.get_world_size()
    seq = ShardedSequence(16 * size, groups(ring=size).topology, masks.full(), "contiguous")
    setting = Setting(seq.plan(seq), KERNELS["reference"], 0.3, None)
    with Counted() as counted:
        q, k, v, dout = (torch.randn(1, 16, heads, 8) for heads in (4, kv_heads, kv_heads, 4))
        wire = Wire.of(k, v)
        kv = wire.join(k, v)
        out, lse = passes.attend(q, kv, wire, setting)
        forward = counted.peak
        passes.gradients(q, kv, wire, Rows(out, lse, dout), setting)
        return forward, counted.peak


@pytest.mark.parametrize("kv_heads", [2, 4], ids=["keys travel", "queries travel"])
def test_memory_does_not_grow_with_the_ring(world: Callable[[int], World], kv_heads: int) -> None:
    """From 5 ranks on: in smaller rings sums are home before as many are under way."""
    (wanted, *_) = world(5).run(most_bytes, kv_heads)
    for size in (5, 6, 8):
        assert world(size).run(most_bytes, kv_heads) == [wanted] * size
