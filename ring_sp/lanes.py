"""Ways between a device and host memory, beside what the device computes."""

from typing import Any, Protocol

import torch
from torch import Tensor


class Lane(Protocol):
    """Copies of one device, made in the order in which they are asked for. A copy comes after all
    that the device was given before, and beside what it is given until somebody waits.
    """

    def host(self, num_bytes: int) -> Tensor:
        """Host memory that copies can reach: uint8 [num_bytes]."""

    def copy(self, into: Tensor, source: Tensor) -> Any:
        """Start a copy; what is returned is for `wait`. Neither tensor may be let go before."""

    def wait(self, copied: Any) -> None:
        """What the device is given from now on comes after that copy. Nobody waits on the host."""


class HostLane:
    """Between two places in host memory: copies are made at once."""

    def host(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu")

    def copy(self, into: Tensor, source: Tensor) -> None:
        into.copy_(source)

    def wait(self, copied: None) -> None:
        pass


class CudaLane:
    """A stream of its own for copies in both directions, from and to pinned memory.

    One stream, so that a buffer is never written while it is read, whoever had it before. torch
    rounds pinned memory up to a power of two.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def host(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def copy(self, into: Tensor, source: Tensor) -> tuple[torch.cuda.Event, torch.cuda.Stream]:
        # Asked for before `stream`, inside which it would be another.
        asking = torch.cuda.current_stream(self._stream.device)
        # What is copied was computed there, and what is copied to may still be read there: the
        # allocator gives memory out again as soon as its stream was given the last use of it.
        self._stream.wait_stream(asking)
        with torch.cuda.stream(self._stream):
            into.copy_(source, non_blocking=True)
            return self._stream.record_event(), asking

    def wait(self, copied: tuple[torch.cuda.Event, torch.cuda.Stream]) -> None:
        event, asking = copied
        # Memory goes back to the stream that asked, wherever it is used meanwhile.
        asking.wait_event(event)
        torch.cuda.current_stream(self._stream.device).wait_event(event)


def lane_of(device: torch.device) -> Lane:
    """A new lane of a device. Raises NotImplementedError for others than CUDA's and the CPU."""
    if device.type == "cpu":
        return HostLane()
    if device.type == "cuda":
        return CudaLane(device)
    raise NotImplementedError(f"offload copies from CUDA devices, and from the CPU; got {device}")
