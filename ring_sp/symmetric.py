"""Transfers by the GPUs' copy engines, through memory that the ranks of an axis share.

A transfer of NCCL is a kernel: it takes multiprocessors from the attention beside it, and holds
them while it waits for its peer. Here a stream waits for flags and starts copies, and no
multiprocessor takes part. For GPUs of one host that reach each other's memory (torch's symmetric
memory). Nothing watches the flags: where a rank dies, its peers wait until they are killed.
"""

import ctypes
from functools import cache
from importlib import import_module
from socket import gethostname
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

SLOTS = 2, 3
"""Of messages with each tag: a rank receives one, reads another, and sums come home. In a single
ring of two ranks one of each will do: nothing goes on.
"""
ALIGNMENT = 512
READY, DONE = 0, 1
"""A flag says that the receiver's slot is free, or that the message is there."""
FENCED, EQUAL = 0, 1
"""The driver's flags: a value is written once all before it can be seen; wait for that value."""


class Room(NamedTuple):
    """What a message needs."""

    numel: int
    dtype: torch.dtype
    device: torch.device


class Memory:
    """The slots and flags of each rank of an axis, which may be `nested` among rings. Collective,
    here and where it grows.
    """

    def __init__(self, group: dist.ProcessGroup, nested: bool) -> None:
        self.rank, self.size, self._group = dist.get_rank(group), dist.get_world_size(group), group
        self._slots = SLOTS if nested or self.size > 2 else (1, 1)
        self._slot_bytes = [0 for _ in SLOTS]
        self._handle: Any = None
        self._streams: list[torch.cuda.Stream] = []
        self._last: torch.cuda.Event | None = None
        self.reserve(0, ALIGNMENT, torch.device("cuda", torch.cuda.current_device()))

    def reserve(self, tag: int, num_bytes: int, device: torch.device) -> None:
        """Room for messages of up to `num_bytes`: the same number on every rank."""
        if num_bytes <= self._slot_bytes[tag]:
            return
        symmetric = import_module("torch.distributed._symmetric_memory")
        self._slot_bytes[tag] = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        torch.cuda.synchronize(device)
        self._tensor = symmetric.empty(self._at(len(SLOTS), 0), dtype=torch.uint8, device=device)
        self._tensor[: self._at(0, 0)] = 0
        torch.cuda.synchronize(device)
        self._handle = symmetric.rendezvous(self._tensor, self._group)
        self._streams = self._streams or [torch.cuda.Stream(device, -1) for _ in SLOTS]

    def stream(self, tag: int) -> torch.cuda.Stream:
        """Where messages are moved, once all is done that the current stream has been given, and
        the last pass, which may have been on another.
        """
        stream = self._streams[tag]
        stream.wait_stream(torch.cuda.current_stream())
        if self._last is not None and not torch.cuda.is_current_stream_capturing():
            stream.wait_event(self._last)
        return stream

    def release(self) -> None:
        """A pass has used all that it received, up to here on the current stream."""
        if not torch.cuda.is_current_stream_capturing():
            self._last = torch.cuda.current_stream().record_event()

    def slot(self, tag: int, slot: int, room: Room) -> Tensor:
        """A slot of this rank as a 1-D tensor."""
        return self._slot(self.rank, tag, slot, room.numel, room.dtype)

    def put(self, tensor: Tensor, to: int, tag: int, slot: int) -> None:
        """Copy a tensor into a rank's slot, on the current stream."""
        self._slot(to, tag, slot, tensor.numel(), tensor.dtype).copy_(tensor)

    def set_flag(self, owner: int, kind: int, tag: int) -> None:
        """Tell a rank, once the work before it on the current stream is done."""
        _call("cuStreamWriteValue32_v2", self._flag(owner, kind, tag, self.rank), 1, FENCED)

    def wait_flag(self, kind: int, tag: int, peer: int) -> None:
        """Let the current stream wait until a peer has told this rank, and take the flag down."""
        flag = self._flag(self.rank, kind, tag, peer)
        _call("cuStreamWaitValue32_v2", flag, 1, EQUAL)
        _call("cuStreamWriteValue32_v2", flag, 0, FENCED)

    def _slot(self, owner: int, tag: int, slot: int, numel: int, dtype: torch.dtype) -> Tensor:
        at = self._at(tag, slot) // dtype.itemsize
        found: Tensor = self._handle.get_buffer(owner, (numel,), dtype, at)
        return found

    def _flag(self, owner: int, kind: int, tag: int, peer: int) -> int:
        """The address here of the flag of `owner` that `peer` sets."""
        base: int = self._handle.buffer_ptrs[owner]
        return base + 4 * ((kind * len(SLOTS) + tag) * self.size + peer)

    def _at(self, tag: int, slot: int) -> int:
        """Where a slot begins, in bytes; behind the flags and the slots of smaller tags."""
        flags = -(-8 * len(SLOTS) * self.size // ALIGNMENT) * ALIGNMENT
        before = zip(self._slots[:tag], self._slot_bytes, strict=False)
        return flags + sum(n * size for n, size in before) + (slot and slot * self._slot_bytes[tag])


class Copies:
    """What `ring.Transfer` is, by copies."""

    def __init__(self, memory: Memory, tag: int) -> None:
        self._memory, self._tag = memory, tag
        self._sent: list[tuple[Tensor, int, int]] = []
        self._sources: list[int] = []
        self._event: torch.cuda.Event | None = None

    def send(self, tensor: Tensor, to: int, slot: int) -> None:
        self._sent.append((tensor, to % self._memory.size, slot))

    def receive(self, room: Room, source: int, slot: int) -> Tensor:
        """A tensor whose content is undefined until `wait`, and again once the next message comes
        into the slot.
        """
        self._sources.append(source % self._memory.size)
        return self._memory.slot(self._tag, slot, room)

    def start(self) -> "Copies":
        if not self._sent and not self._sources:
            return self
        memory, tag = self._memory, self._tag
        stream = memory.stream(tag)
        with torch.cuda.stream(stream):
            for source in self._sources:
                memory.set_flag(source, READY, tag)
            for tensor, to, slot in self._sent:
                memory.wait_flag(READY, tag, to)
                memory.put(tensor, to, tag, slot)
                memory.set_flag(to, DONE, tag)
            for source in self._sources:
                memory.wait_flag(DONE, tag, source)
        self._event = stream.record_event()
        return self

    def wait(self) -> None:
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)
        self._sent, self._event = [], None


def check(group: dist.ProcessGroup | None, rings: list[list[int]], worldwide: bool) -> None:
    """Raise NotImplementedError on every rank of a group (None: the world) if one of them has no
    memory to share, or one of `rings`, in numbers of the group, spans hosts; if `worldwide` on all
    ranks of the world, each of which calls it with its own group. Collective.
    """
    facts: list[tuple[str | None, str]] = [(None, "")] * dist.get_world_size(group)
    dist.all_gather_object(facts, (_unavailable(), gethostname()), group=group)
    reason = next((reason for reason, _ in facts if reason), None)
    if any(len({facts[place][1] for place in ring}) > 1 for ring in rings):
        reason = "needs all GPUs of a ring in one host"
    if worldwide:
        reasons = [reason] * dist.get_world_size()
        dist.all_gather_object(reasons, reason)
        reason = next(filter(None, reasons), None)
    if reason:
        raise NotImplementedError(f"exchange='copies' {reason}; use exchange='messages'")


def _unavailable() -> str | None:
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "needs NVIDIA GPUs that reach each other's memory"
    try:
        import_module("torch.distributed._symmetric_memory")
        _driver()
    except (ImportError, OSError) as error:
        return f"needs torch's symmetric memory and the CUDA driver ({error})"
    return None


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, address: int, value: int, flags: int) -> None:
    """A memory operation of the driver on the current stream; torch has none that waits."""
    stream = torch.cuda.current_stream().cuda_stream
    status = getattr(_driver(), name)(
        ctypes.c_void_p(stream), ctypes.c_uint64(address), ctypes.c_uint32(value), flags
    )
    if status:
        raise RuntimeError(f"{name} failed with the CUDA driver's error {status}")
