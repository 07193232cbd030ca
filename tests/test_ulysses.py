from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.distributed as dist
from conftest import World
from ranks import groups
from torch import Tensor

from ring_sp.ring import Axis
from ring_sp.ulysses import kv_replication, to_heads, to_sequence

Sizes = dict[str, int]

PEERS: list[tuple[int, Sizes]] = [
    (2, {"ulysses": 2}),
    (3, {"ulysses": 3}),
    (4, {"ulysses": 4}),
    (4, {"ring": 2, "ulysses": 2}),
]
LENS: list[tuple[int, ...]] = [(5, 4, 4, 3), (1, 2, 7, 1), (3, 3, 3, 3)]
SHAPES = [(1, 1, 1), (2, 2, 3), (1, 3, 2)]
"""Batch, heads of each peer, head dimension."""


def named(lens: tuple[int, ...], heads: int, batch: int, dim: int) -> Tensor:
    """[B, all tokens, H, D] with a number of its own in each place."""
    return torch.arange(batch * sum(lens) * heads * dim).view(batch, sum(lens), heads, dim).double()


def trades(sizes: Sizes) -> list[str]:
    """What failed on this rank."""
    manager, failed = groups(**sizes), []
    peers = manager.topology.ulysses
    for lens, (batch, own_heads, dim) in product([every[: peers.size] for every in LENS], SHAPES):
        whole = named(lens, own_heads * peers.size, batch, dim) + 1e6 * manager.rank("ring")
        tokens = whole.split(lens, 1)[peers.rank]
        heads = whole.split(own_heads, 2)[peers.rank]
        laws = {
            "all tokens of this peer's heads": torch.equal(to_heads(tokens, peers, lens), heads),
            "all heads of this peer's tokens": torch.equal(to_sequence(heads, peers, lens), tokens),
            "views": torch.equal(to_heads(tokens.mT.contiguous().mT, peers, lens), heads),
            "views back": torch.equal(to_sequence(heads.mT.contiguous().mT, peers, lens), tokens),
            **gradients(tokens, heads, peers, lens),
        }
        failed += [f"{law}: {lens}, {own_heads} heads" for law, holds in laws.items() if not holds]
    return failed


def gradients(tokens: Tensor, heads: Tensor, peers: Axis, lens: tuple[int, ...]) -> dict[str, bool]:
    make = torch.Generator().manual_seed(dist.get_rank())
    x, z, y, w = (
        torch.randn(like.shape, generator=make, dtype=torch.float64).requires_grad_()
        for like in (tokens, tokens, heads, heads)
    )
    (dx,) = torch.autograd.grad(to_heads(x, peers, lens), x, y)
    (dy,) = torch.autograd.grad(to_sequence(y, peers, lens), y, x)
    products = torch.stack(
        [(to_heads(x, peers, lens) * y).sum(), (x * to_sequence(y, peers, lens)).sum()]
    ).detach()
    dist.all_reduce(products, group=peers.group)

    def second(trade: Callable[..., Tensor], a: Tensor, b: Tensor) -> bool:
        """An all-to-all moves numbers: the derivatives of the sum of cubes are those of a cube."""
        (first,) = torch.autograd.grad(trade(a, peers, lens).pow(3).sum(), a, create_graph=True)
        (then,) = torch.autograd.grad(first, a, b)
        return torch.equal(first, 3 * a.square()) and torch.allclose(then, 6 * a * b, rtol=1e-14)

    return {
        "the gradient of to_heads is to_sequence": torch.equal(dx, to_sequence(y, peers, lens)),
        "the gradient of to_sequence is to_heads": torch.equal(dy, to_heads(x, peers, lens)),
        "adjoint": torch.allclose(products[0], products[1], rtol=1e-12),
        "the second derivative of to_heads": second(to_heads, x, z),
        "the second derivative of to_sequence": second(to_sequence, y, w),
    }


@pytest.mark.parametrize(("size", "sizes"), PEERS, ids=str)
def test_to_heads_and_to_sequence_move_every_number_and_are_each_others_inverse_and_gradient(
    world: Callable[[int], World], size: int, sizes: Sizes
) -> None:
    assert world(size).run(trades, sizes) == [[]] * size


def test_one_peer_keeps_what_it_has() -> None:
    x = torch.randn(1, 3, 2, 4)
    assert to_heads(x, Axis(), (3,)) is x and to_sequence(x, Axis(), (3,)) is x


def serves(copies: int, heads: int, kv_heads: int, size: int) -> bool:
    """Whether each peer gets whole key heads, and its query heads read those that they should."""
    if kv_heads * copies % size:
        return False
    own, own_kv = heads // size, kv_heads * copies // size
    if own % own_kv:
        return False
    read = [
        (peer * own_kv + head // (own // own_kv)) // copies
        for peer in range(size)
        for head in range(own)
    ]
    return read == [head // (heads // kv_heads) for head in range(heads)]


def test_key_heads_are_repeated_as_seldom_as_the_peers_allow() -> None:
    for heads in range(1, 17):
        for kv_heads, size in product(range(1, heads + 1), range(1, heads + 1)):
            if heads % kv_heads == 0 and heads % size == 0:
                fewest = next(n for n in range(1, heads + 1) if serves(n, heads, kv_heads, size))
                assert kv_replication(heads, kv_heads, size) == fewest, (heads, kv_heads, size)


def test_query_heads_that_the_peers_do_not_divide_are_refused() -> None:
    for heads, size in product(range(1, 17), range(1, 17)):
        if heads % size:
            with pytest.raises(
                ValueError, match=f"over {size} ranks .*{size} divides; got {heads}"
            ):
                kv_replication(heads, 1, size)
