"""Copies beside a GPU's computation: exact, for less memory, and nobody waits for them.

`bash tests/run.sh --gpu tests/test_lanes.py`
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from ringed import relative
from test_checkpointing import transformer
from torch import Tensor

from ring_sp import Checkpointing, Offload, RingTransformer, checkpoint
from ring_sp.loss import shift_labels

pytestmark = pytest.mark.gpu

DEPTH, ROWS, COLUMNS = 6, 1 << 16, 1 << 10
LAYER = 4 * ROWS * COLUMNS
"""Bytes of a layer's input, 256 MiB: some 5 ms of PCIe 5."""
BUSY = 30_000_000
"""Cycles of the GPU in each layer, some 15 ms."""


class Layers:
    """Layers that need their input in backward, each a checkpoint."""

    def __init__(self, offload: Offload | None) -> None:
        self.offload = offload
        make = torch.Generator("cuda").manual_seed(5)
        drawn = torch.randn(DEPTH + 1, COLUMNS, generator=make, device="cuda")
        self.weights = [weight.requires_grad_() for weight in drawn]
        self.spread = torch.linspace(0.5, 1, ROWS, device="cuda")[:, None]

    @staticmethod
    def layer(x: Tensor, weight: Tensor) -> Tensor:
        torch.cuda._sleep(BUSY)
        return (x * weight).sin()

    def step(self) -> list[Tensor]:
        x = self.spread * self.weights[0]
        for weight in self.weights[1:]:
            x = checkpoint(self.layer, x, weight, offload=self.offload)
        return list(torch.autograd.grad(x.sum(), self.weights))


def measured(run: Callable[[], object]) -> tuple[float, int]:
    """Milliseconds of the GPU, and the most bytes above those before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    with waiting_refused():
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end), torch.cuda.max_memory_allocated() - before


@contextmanager
def waiting_refused() -> Iterator[None]:
    """Raises where torch makes the host wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_offload_is_exact_takes_less_memory_and_hides_its_copies() -> None:
    plain, offloaded = Layers(None), Layers(Offload())
    # The first step pins host memory, for which the device waits.
    assert all(map(torch.equal, offloaded.step(), plain.step()))
    (alone, whole), (beside, less) = measured(plain.step), measured(offloaded.step)
    assert all(map(torch.equal, offloaded.step(), plain.step()))
    # On the device are the last layer's input, or that of the layer at hand, and one on its way.
    assert whole - less >= (DEPTH - 3) * LAYER
    here = torch.empty(LAYER, dtype=torch.uint8, device="cuda")
    there = torch.empty(LAYER, dtype=torch.uint8, pin_memory=True)
    out, _ = measured(lambda: there.copy_(here, non_blocking=True))
    back, _ = measured(lambda: here.copy_(there, non_blocking=True))
    copies = (DEPTH - 1) * (out + back)
    assert beside - alone < copies / 4, (alone, beside, copies)


def test_layers_whose_copies_take_longer_than_they_do_are_exact() -> None:
    plain, offloaded = Layers(None), Layers(Offload())
    plain.layer = offloaded.layer = lambda x, weight: (x * weight).sin()  # type: ignore[method-assign]
    wanted = plain.step()
    for _ in range(5):
        assert all(map(torch.equal, offloaded.step(), wanted))


def loss_and_gradients(module: RingTransformer, tokens: Tensor) -> list[Tensor]:
    loss = module(tokens, shift_labels(tokens))
    return [loss.detach(), *torch.autograd.grad(loss, list(module.parameters()))]


def test_a_transformer_that_offloads_is_the_same() -> None:
    tokens = torch.randint(17, (2, 29), device="cuda")
    wanted = loss_and_gradients(transformer({}, {}).cuda(), tokens)
    module = transformer({}, {"checkpointing": Checkpointing(offload=True)}).cuda()
    module.offload = Offload(min_bytes=0)
    for _ in range(3):
        found = loss_and_gradients(module, tokens)
        assert max(map(relative, found, wanted)) < 1e-12
