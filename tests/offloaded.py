"""An offload whose copies are made as late as a device may, and layers for it."""

import ctypes

import torch
from ringed import relative
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ring_sp import Offload, checkpoint


class LateLane:
    """Copies when somebody waits, and not before; what it copies to is nonsense until then. Fails
    where memory was let go before its copy.
    """

    def __init__(self, log: list[str] | None = None) -> None:
        self.hosts: list[int] = []
        self.log = [] if log is None else log
        self.places: set[int] = set()
        self.done = 0
        self.queue: list[tuple[StorageWeakRef, int, StorageWeakRef, int, int]] = []

    def host(self, num_bytes: int) -> Tensor:
        self.hosts.append(num_bytes)
        buffer = torch.empty(num_bytes, dtype=torch.uint8)
        self.places.add(buffer.data_ptr())
        return buffer

    def copy(self, into: Tensor, source: Tensor) -> int:
        assert into.stride() == source.stride() and into.dtype == source.dtype
        memory = [(StorageWeakRef(x.untyped_storage()), x.data_ptr()) for x in (into, source)]
        pending = [entry[3] for entry in self.queue[self.done :]]
        if into.data_ptr() not in pending:
            ctypes.memset(into.data_ptr(), 0xFF, into.nbytes)
        self.queue.append((*memory[0], *memory[1], into.nbytes))
        self.log.append(f"{'out' if into.data_ptr() in self.places else 'in'} {into.nbytes}")
        return len(self.queue)

    def wait(self, copied: int) -> None:
        for into, to, source, at, size in self.queue[self.done : copied]:
            assert not into.expired() and not source.expired()
            ctypes.memmove(to, at, size)
        self.done = max(self.done, copied)

    @property
    def waiting(self) -> int:
        return len(self.queue) - self.done


def late_offload(layers_on_device: int = 1) -> tuple[Offload, LateLane]:
    lane = LateLane()
    return Offload(layers_on_device, 0, lambda _: lane), lane


class Chain:
    """Layers that need their input in backward, each a checkpoint; layer n keeps n + 1 numbers."""

    def __init__(self, offload: Offload | None, depth: int = 4) -> None:
        self.offload = offload
        make = torch.Generator().manual_seed(5)
        self.x = torch.randn(3, generator=make).double().requires_grad_()
        self.weights = [
            torch.randn(3 + n, 2 + n, generator=make).double().requires_grad_()
            for n in range(1, depth + 1)
        ]

    def forward(self, scale: float = 1.0) -> Tensor:
        x = self.x.new_tensor([scale, 1.0, 1.0]) * self.x
        for weight in self.weights:
            x = checkpoint(self.layer, x, weight, offload=self.offload)
        return x.square().sum()

    @staticmethod
    def layer(x: Tensor, weight: Tensor) -> Tensor:
        return (weight @ x.sin()).tanh()

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, *self.weights]

    def taken(self, *scales: float, backwards: bool = False) -> list[Tensor]:
        """Gradients of several forwards, added, whose backwards come in the same order, or not."""
        losses = [self.forward(scale) for scale in scales]
        grads = [
            torch.autograd.grad(loss, self.leaves)
            for loss in (losses[::-1] if backwards else losses)
        ]
        return [torch.stack(parts).sum(0) for parts in zip(*grads, strict=True)]


def equal(found: list[Tensor], wanted: list[Tensor]) -> bool:
    # Two orders of a sum may differ in its last bit.
    return max(map(relative, found, wanted)) < 1e-14
