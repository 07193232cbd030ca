"""What checkpoints keep, in host memory from the next checkpoint's forward to its own backward.

Copies are made beside computation. One stretch is on its way to the host at a time, and one on its
way back ahead of need; the last stays on the device, since backward begins with it. Device memory
is let go once the device has been told to wait for its copy, so that no stream must be recorded;
host memory is used again, since to pin it anew makes the device wait.
"""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ring_sp.kept import refuse_changed
from ring_sp.lanes import Lane, lane_of


class Offload:
    """Host memory for what checkpoints keep, and the order in which it goes there and comes back.

    One for a model: it is given to each of its checkpoints, and holds its buffers between steps.
    `layers_on_device` of the latest checkpoints stay on the device; tensors of fewer than
    `min_bytes` bytes all do. Any order of backwards is right; the opposite of the forwards' is
    overlapped. Raises ValueError for numbers that make no sense.
    """

    def __init__(
        self,
        layers_on_device: int = 1,
        min_bytes: int = 1 << 20,
        lane: Callable[[torch.device], Lane] = lane_of,
    ) -> None:
        if layers_on_device < 1 or min_bytes < 0:
            raise ValueError(
                f"layers_on_device must be at least 1, min_bytes at least 0; got "
                f"{layers_on_device} and {min_bytes}"
            )
        self.layers_on_device, self.min_bytes, self._make_lane = layers_on_device, min_bytes, lane
        self._shelves: dict[torch.device, _Shelf] = {}
        self._stretches: list[weakref.ref[Stretch]] = []
        """In the order of their forwards; those whose backward is over are gone."""
        self._leaving: list[tuple[Lane, Any, Tensor]] = []
        """Copies to the host, and what they copy."""
        self._ahead: weakref.ref[Stretch] | None = None
        """What was fetched before it was asked for."""

    def open(self) -> "Stretch":
        """A stretch for one checkpoint's tensors; those of `layers_on_device` checkpoints ago start
        for the host.
        """
        self.settle()
        alive = [stretch for stretch in self._alive() if not stretch.sent]
        for stretch in alive[: len(alive) + 1 - self.layers_on_device]:
            self._leaving += stretch.send()
        opened = Stretch(self)
        self._stretches = [weakref.ref(each) for each in self._alive()]
        self._stretches.append(weakref.ref(opened))
        return opened

    def settle(self) -> None:
        """Let go of what is on its way to the host, after its copy. The next stretch does it, and
        the first backward; one may be long after the last stretch.
        """
        for lane, copied, _ in self._leaving:
            lane.wait(copied)
        self._leaving.clear()

    def shelf(self, device: torch.device) -> "_Shelf":
        """Buffers for the tensors of a device."""
        if device not in self._shelves:
            self._shelves[device] = _Shelf(self._make_lane(device))
        return self._shelves[device]

    def fetch_before(self, wanted: "Stretch") -> None:
        """Start for the device the stretch whose backward comes after that of the one that is
        `wanted` now.
        """
        self.settle()
        ahead = self._ahead() if self._ahead else None
        before = self._before(wanted)
        if ahead is not None and ahead not in (wanted, before):
            ahead.drop()
        if before is not None:
            before.fetch()
        self._ahead = weakref.ref(before) if before else None

    def _before(self, wanted: "Stretch") -> "Stretch | None":
        earlier = None
        for stretch in self._alive():
            if stretch is wanted:
                break
            earlier = stretch
        return earlier

    def _alive(self) -> "Iterator[Stretch]":
        return (stretch for ref in self._stretches if (stretch := ref()) is not None)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Offload":
        """Without buffers."""
        return Offload(self.layers_on_device, self.min_bytes, self._make_lane)


class Stretch:
    """The tensors that one checkpoint keeps: they go to the host, and come back, together."""

    def __init__(self, offload: Offload) -> None:
        self.offload, self.sent = offload, False
        self._kept: list[weakref.ref[_Parcel]] = []

    def keep(self, tensor: Tensor) -> Callable[[], Tensor]:
        """What gives the tensor back, any number of times, until it is let go itself. The tensor
        must not be changed in place.
        """
        parcel = _Parcel(tensor, self)
        self._kept.append(weakref.ref(parcel))
        return parcel.get

    def send(self) -> list[tuple[Lane, Any, Tensor]]:
        """Start for the host; the copies, and what is copied."""
        self.sent = True
        return [parcel.send() for parcel in self._parcels() if parcel.travels]

    def fetch(self) -> None:
        """Start for the device."""
        for parcel in self._parcels():
            parcel.fetch()

    def drop(self) -> None:
        """Let go of what is on the device and on the host."""
        for parcel in self._parcels():
            parcel.drop()

    def _parcels(self) -> "list[_Parcel]":
        return [parcel for ref in self._kept if (parcel := ref()) is not None]


class _Parcel:
    """A tensor that is on the device (`here`), on the host (`away`), or both."""

    def __init__(self, tensor: Tensor, stretch: Stretch) -> None:
        self.here: Tensor | None = tensor.detach()
        self.away: Tensor | None = None
        self.coming: Any = None
        """The copy to `here` that nobody has waited for, in a tuple."""
        self.version, self.stretch = tensor._version, stretch
        self.like = torch.empty_like(self.here, device="meta")
        self.device, self.shelf = tensor.device, stretch.offload.shelf(tensor.device)

    @property
    def num_bytes(self) -> int:
        return self.like.numel() * self.like.element_size()

    @property
    def travels(self) -> bool:
        return self.here is not None and self.num_bytes >= self.stretch.offload.min_bytes

    def get(self) -> Tensor:
        self.fetch()
        self.stretch.offload.fetch_before(self.stretch)
        self._wait()
        here = self.here
        assert here is not None
        if self.away is None:
            refuse_changed(here, self.version)
        else:
            self.here = None
        return here

    def send(self) -> tuple[Lane, Any, Tensor]:
        here, self.here = self.here, None
        assert here is not None
        refuse_changed(here, self.version)
        self.away = self.shelf.take(self.num_bytes)
        return self.shelf.lane, self.shelf.lane.copy(self._shaped(self.away), here), here

    def fetch(self) -> None:
        if self.here is None and self.away is not None:
            shape, strides = self.like.shape, self.like.stride()
            self.here = torch.empty_strided(
                shape, strides, dtype=self.like.dtype, device=self.device
            )
            self.coming = (self.shelf.lane.copy(self.here, self._shaped(self.away)),)

    def drop(self) -> None:
        self._wait()  # The copy writes to memory that others get as soon as it is let go.
        if self.away is not None:
            self.here = None

    def _wait(self) -> None:
        if self.coming:
            self.shelf.lane.wait(*self.coming)
            self.coming = None

    def __del__(self) -> None:
        self.drop()
        if self.away is not None:
            self.shelf.give(self.away)

    def _shaped(self, buffer: Tensor) -> Tensor:
        flat = buffer[: self.num_bytes].view(self.like.dtype)
        return flat.as_strided(self.like.shape, self.like.stride())


class _Shelf:
    """Host buffers that nobody uses now."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self._free: list[Tensor] = []
        """The smallest first."""

    def take(self, num_bytes: int) -> Tensor:
        """The smallest that is large enough; or a new one in place of the largest, if all are too
        small, so that there are never more than were in use at once.
        """
        for at, buffer in enumerate(self._free):
            if buffer.numel() >= num_bytes:
                return self._free.pop(at)
        if self._free:
            self._free.pop()
        return self.lane.host(num_bytes)

    def give(self, buffer: Tensor) -> None:
        self._free.append(buffer)
        self._free.sort(key=Tensor.numel)
