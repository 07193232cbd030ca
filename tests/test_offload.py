"""What checkpoints keep goes to the host and comes back: copies made as late as a device may."""

import copy
import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import World
from offloaded import Chain, LateLane, equal, late_offload
from ranks import raised
from test_checkpointing import OPTIONS, loss_and_gradients, transformer
from test_operator import SPREAD, Sizes
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ring_sp import (
    Checkpointing,
    Offload,
    RingTransformer,
    ShardedSequence,
    checkpoint,
    ring_attention,
)
from ring_sp.lanes import HostLane, Lane


def offloading(sizes: Sizes, offload: Offload, **options: Any) -> RingTransformer:
    module = transformer(sizes, {"checkpointing": Checkpointing(offload=True, **options)})
    module.offload = offload
    return module


def same_bits(sizes: Sizes, every: int, keep: bool) -> bool:
    saved = Checkpointing(every, keep)
    wanted = loss_and_gradients(transformer(sizes, {"checkpointing": saved}))
    offload, lane = late_offload()
    module = offloading(sizes, offload, every=every, keep_attention=keep)
    found = [loss_and_gradients(module) for _ in range(2)]
    assert lane.queue and not lane.waiting
    return all(map(torch.equal, [*wanted, *wanted], [*found[0], *found[1]]))


@pytest.mark.parametrize(("every", "keep"), [(1, True), (2, True), (1, False)])
@pytest.mark.parametrize(("size", "sizes"), SPREAD, ids=str)
def test_a_transformer_that_offloads_gives_the_same_bits(
    world: Callable[[int], World], size: int, sizes: Sizes, every: int, keep: bool
) -> None:
    assert all(world(size).run(same_bits, sizes, every, keep))


def test_layers_leave_after_the_next_one_starts_and_come_back_before_they_are_wanted() -> None:
    offload, lane = late_offload()
    chain = Chain(offload)
    loss = chain.forward()
    # Layer n has 2 + n numbers of 8 bytes; the last stays.
    assert lane.log == ["out 24", "out 32", "out 40"]
    seen: list[list[str]] = []
    for x in chain.weights:
        x.register_hook(lambda _: seen.append(list(lane.log[3:])))
    loss.backward()
    # With the last layer's backward starts the copy for the one before it, and so on.
    assert seen == [["in 40"], ["in 40", "in 32"], *[["in 40", "in 32", "in 24"]] * 2]


def test_one_layer_is_on_its_way_at_a_time() -> None:
    offload, lane = late_offload()
    most: list[int] = []
    chain = Chain(offload, depth=6)
    for x in chain.weights:
        x.register_hook(lambda _: most.append(lane.waiting))

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        most.append(lane.waiting)
        return Chain.layer(x, weight)

    chain.layer = layer  # type: ignore[method-assign]
    chain.forward().backward()
    assert max(most) == 1 and len(most) == 18


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_last_layers_stay(layers: int) -> None:
    offload, lane = late_offload(layers)
    assert equal(Chain(offload).taken(1.0), Chain(None).taken(1.0))
    assert lane.log.count("in 24") == 1 and len(lane.log) == 2 * (4 - layers)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("scales", [(1.0, 2.0), (1.0, -1.0, 0.5)])
def test_backwards_may_come_in_any_order(scales: tuple[float, ...], backwards: bool) -> None:
    offload, _ = late_offload()
    chain, plain = Chain(offload), Chain(None)
    for _ in range(2):
        assert equal(chain.taken(*scales, backwards=backwards), plain.taken(*scales))


def test_a_graph_that_is_kept_can_be_gone_through_again() -> None:
    offload, lane = late_offload()
    chain = Chain(offload)
    loss = chain.forward()
    first, second = (torch.autograd.grad(loss, chain.leaves, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert lane.log.count("in 24") == 2


def test_what_was_fetched_for_another_order_is_let_go() -> None:
    offload, _ = late_offload()
    kept = [offload.open().keep(torch.full((2,), float(n))) for n in range(5)]
    for n in (3, 1, 3, 0, 2, 4):
        assert kept[n]().tolist() == [n] * 2
        on_device = [get.__self__.here is not None for get in kept]  # type: ignore[attr-defined]
        assert sum(on_device[:-1]) <= 1  # The last never left; of others one is ahead.


def test_buffers_serve_again() -> None:
    offload, lane = late_offload()
    chain = Chain(offload)
    for _ in range(3):
        chain.taken(1.0)
    assert sorted(lane.hosts) == [24, 32, 40]
    chain.taken(1.0, 2.0)
    # Those of the second forward, and the last layer of the first.
    assert len(lane.hosts) == 7


def test_lengths_that_vary_do_not_add_buffers() -> None:
    offload, lane = late_offload()
    for size in (8, 4, 9, 3, 20, 20, 1):
        kept = [offload.open().keep(torch.full((size,), float(n))) for n in range(4)]
        assert [give().unique().tolist() for give in kept] == [[0.0], [1.0], [2.0], [3.0]]
        del kept
        free = offload.shelf(torch.device("cpu"))._free
        assert len(free) == 3 and sum(x.numel() for x in free) <= 3 * 20 * 4
    assert len(lane.hosts) == 9  # As often as the length grew.


class FailedError(Exception):
    pass


def fail(*_: Tensor) -> Tensor:
    raise FailedError


def test_an_exception_leaves_nothing_behind() -> None:
    offload, lane = late_offload()
    chain, wanted = Chain(offload), Chain(None).taken(1.0)
    for _ in range(3):
        x = chain.x * 1
        for weight in chain.weights[:3]:
            x = checkpoint(Chain.layer, x, weight, offload=offload)
        with pytest.raises(FailedError):
            checkpoint(fail, x, offload=offload)
        failing = checkpoint(Chain.layer, x, chain.weights[3], offload=offload)
        failing.register_hook(fail)
        with pytest.raises(FailedError):
            failing.sum().backward()
        del x, failing
        gc.collect()
        assert equal(chain.taken(1.0), wanted)
    assert len(lane.hosts) <= 4 and not lane.waiting


def test_models_may_share_host_memory_or_not() -> None:
    offload, lane = late_offload()
    chains = [Chain(offload), Chain(offload, 3), Chain(late_offload()[0])]
    wanted = [Chain(None), Chain(None, 3), Chain(None)]
    losses = [chain.forward() for chain in chains]
    for chain, plain, loss in zip(chains, wanted, losses, strict=True):
        assert equal(list(torch.autograd.grad(loss, chain.leaves)), plain.taken(1.0))
    assert len(lane.hosts) == 6 and not lane.waiting


def test_the_device_lets_go_of_what_has_left() -> None:
    offload, _ = late_offload()
    stored: list[StorageWeakRef] = []
    weight = torch.ones((), requires_grad=True)

    def layer(x: Tensor) -> Tensor:
        alive.append(sum(not each.expired() for each in stored))
        stored.append(StorageWeakRef(x.untyped_storage()))
        return x * weight

    alive: list[int] = []
    x = torch.ones(5) * weight
    for _ in range(6):
        x = checkpoint(layer, x, offload=offload)
    # What this layer is given is not yet counted; what was before it is leaving.
    assert alive == [0, 1, 1, 1, 1, 1]
    x.sum().backward()


def test_strides_come_back() -> None:
    offload, _ = late_offload()
    turned, spread = torch.randn(3, 4).mT, torch.randn(2, 1).expand(2, 3)
    gives = [place.open().keep(x) for place, x in ((offload, turned), (Offload(1, 0), spread))]
    offload.open()
    assert gives[0]().stride() == (1, 4) and gives[1]().equal(spread)


def test_small_tensors_and_those_that_nobody_computed_stay() -> None:
    lane = LateLane()
    offload = Offload(min_bytes=32, lane=lambda _: lane)
    assert equal(Chain(offload).taken(1.0), Chain(None).taken(1.0))
    assert lane.log == ["out 32", "out 40", "in 40", "in 32"]


def test_attention_that_is_kept_travels() -> None:
    offload, lane = late_offload()
    seq, weight = ShardedSequence(8), torch.ones((), requires_grad=True)
    x = torch.randn(1, 8, 2, 4) * weight
    for _ in range(2):
        x = checkpoint(ring_attention, x, x, x, seq, offload=offload)
    out, lse = x.numel() * 4, 8 * 2 * 4
    assert sorted(lane.log) == sorted([*[f"out {out}"] * 4, f"out {lse}"])
    x.sum().backward()


@pytest.mark.parametrize("layers", [1, 2])
def test_what_is_kept_must_not_change(layers: int) -> None:
    offload, _ = late_offload(layers)
    x = torch.ones(3, requires_grad=True) * 1
    y = checkpoint(torch.sin, x, offload=offload)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        checkpoint(torch.sin, y, offload=offload).sum().backward()
    out, seq = torch.randn(1, 8, 2, 4, requires_grad=True), ShardedSequence(8)
    y = checkpoint(lambda x: ring_attention(x, x, x, seq).mul_(2), out * 1)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.sum().backward()


def test_a_copied_model_has_an_offload_of_its_own() -> None:
    offload, lane = late_offload(2)
    module = offloading({}, offload)
    twin = copy.deepcopy(module)
    assert twin.offload is not None and twin.offload is not offload
    assert twin.offload.layers_on_device == 2 and twin.offload.min_bytes == 0
    assert all(map(torch.equal, loss_and_gradients(twin), loss_and_gradients(module)))
    assert len(lane.hosts) == 2 * 3


def test_refusals() -> None:
    offload = late_offload()[0]
    nested = partial(checkpoint, torch.sin, offload=offload)
    x = torch.ones(3, requires_grad=True) * 1
    assert "offload the outer one" in raised(checkpoint, nested, x)
    assert "at least 1" in raised(Offload, 0)
    assert "CUDA devices" in raised(checkpoint, torch.sin, x.to("meta"), offload=Offload())
    compiled = torch.compile(nested, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="offload cannot be compiled"):
        compiled(x)


def test_a_layer_that_is_compiled_can_be_offloaded() -> None:
    offload, lane = late_offload()
    chain = Chain(offload)
    chain.layer = torch.compile(Chain.layer, backend="aot_eager")  # type: ignore[method-assign]
    assert equal(chain.taken(1.0), Chain(None).taken(1.0)) and len(lane.log) == 6


def test_the_host_has_a_lane_of_its_own() -> None:
    lane: Lane = HostLane()
    assert equal(Chain(Offload(min_bytes=0)).taken(1.0, 2.0), Chain(None).taken(1.0, 2.0))
    assert lane.host(3).numel() == 3 and "kept" in OPTIONS
