"""The flags and slots of copies, with threads for the streams of all ranks."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from random import Random
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import torch
from conftest import World
from ranks import groups, raised
from torch import Tensor

from ring_sp import ProcessGroupManager, symmetric
from ring_sp.ring import Axis, Message, Path, ring_pass
from ring_sp.symmetric import SLOTS, Memory, Room

PATIENCE = 20.0
"""Seconds after which a wait is a deadlock."""

local = threading.local()


class Stream:
    """A queue of work with a thread of its own, which dawdles."""

    def __init__(self, seed: int) -> None:
        self._work: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._random = Random(seed)
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            work = self._work.get()
            time.sleep(self._random.choice([0, 0, 1e-3, 3e-3]))
            work()

    def add(self, work: Callable[[], object]) -> None:
        self._work.put(work)

    def wait_stream(self, _: object) -> None:
        """The main thread of a rank is its compute stream: what it has called is done."""

    def record_event(self) -> threading.Event:
        event = threading.Event()
        self.add(event.set)
        return event


class Compute:
    """The current stream outside of transfers: the main thread of a rank."""

    def wait_event(self, event: threading.Event) -> None:
        assert event.wait(PATIENCE), "a transfer never ends"


@contextmanager
def streaming(stream: Stream) -> Iterator[None]:
    local.stream = stream
    yield
    del local.stream


class Shared:
    """What the ranks of an axis see of each other."""

    def __init__(self, size: int, numel: int) -> None:
        self.slots = {
            (rank, tag, slot): torch.full((numel,), torch.nan, dtype=torch.float64)
            for rank in range(size)
            for tag, count in enumerate(SLOTS if size > 2 else (1, 1))
            for slot in range(count)
        }
        self.flags: dict[tuple[int, ...], threading.Event] = defaultdict(threading.Event)
        self.lock = threading.Lock()

    def flag(self, *name: int) -> threading.Event:
        with self.lock:
            return self.flags[name]


class Threads(Memory):
    """`Memory` of one rank, on the streams above."""

    def __init__(self, rank: int, size: int, shared: Shared) -> None:
        self.rank, self.size, self._shared = rank, size, shared
        self.streams = [Stream(rank * len(SLOTS) + tag) for tag in range(len(SLOTS))]

    def reserve(self, tag: int, num_bytes: int, device: torch.device) -> None:
        pass

    def stream(self, tag: int) -> Any:
        return self.streams[tag]

    def slot(self, tag: int, slot: int, room: Room) -> Tensor:
        return self._shared.slots[self.rank, tag, slot][: room.numel]

    def put(self, tensor: Tensor, to: int, tag: int, slot: int) -> None:
        into = self._shared.slots[to, tag, slot][: tensor.numel()]
        halves = tensor.numel() // 2
        for at in (slice(0, halves), slice(halves, None)):
            local.stream.add(lambda at=at: into[at].copy_(tensor[at]))

    def set_flag(self, owner: int, kind: int, tag: int) -> None:
        flag = self._shared.flag(owner, kind, tag, self.rank)

        def work() -> None:
            assert not flag.is_set(), "a flag is set twice"
            flag.set()

        local.stream.add(work)

    def wait_flag(self, kind: int, tag: int, peer: int) -> None:
        flag = self._shared.flag(self.rank, kind, tag, peer)

        def work() -> None:
            if flag.wait(PATIENCE):
                flag.clear()

        local.stream.add(work)


def content(turn: int, source: int) -> Tensor:
    make = torch.Generator().manual_seed(1000 * turn + source)
    return torch.randn(4 + source, generator=make, dtype=torch.float64)


def one_rank(
    rank: int, size: int, memory: Memory, table: list[list[bool]], turns: int
) -> list[tuple[bool, Tensor | None]]:
    """For each turn whether all that this rank saw stayed as it should be, and its sums."""
    random, found = Random(rank), []
    path = Path((Axis(rank, size, None, memory),), lambda reader, source: table[reader][source])
    for turn in range(turns):
        intact = True

        def visit(tensor: Tensor, source: int, turn: int = turn) -> Tensor:
            nonlocal intact
            for _ in range(2):
                intact = intact and torch.equal(tensor, content(turn, source))
                time.sleep(random.choice([0, 1e-3, 2e-3]))
            return tensor * (rank + 2)

        double, cpu = torch.float64, torch.device("cpu")
        message = Message(lambda source: 4 + source, double, cpu, double if turn % 2 else None)
        total = ring_pass(content(turn, rank), path, visit, message)
        found.append((intact, None if total is None else total.clone()))
    return found


def fake_cuda() -> SimpleNamespace:
    return SimpleNamespace(current_stream=Compute, stream=streaming)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("share", [1.0, 0.6], ids=["all", "some"])
def test_nothing_is_overwritten_before_it_is_read_and_all_sums_come_home(
    size: int, share: float
) -> None:
    random, turns = Random(size), 6
    table = [[random.random() < share for _ in range(size)] for _ in range(size)]
    shared = Shared(size, 4 + size)
    found: dict[int, list[tuple[bool, Tensor | None]]] = {}

    def run(rank: int) -> None:
        found[rank] = one_rank(rank, size, Threads(rank, size, shared), table, turns)

    with mock.patch.object(symmetric.torch, "cuda", fake_cuda()):
        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(found) == list(range(size)), "a rank gave up"
    for rank, turned in found.items():
        readers = [r for r in range(size) if r != rank and table[r][rank]]
        for turn, (intact, total) in enumerate(turned):
            assert intact, (rank, turn)
            wanted = sum(r + 2 for r in readers) * content(turn, rank)
            assert (total is not None) == bool(readers and turn % 2)
            assert total is None or torch.allclose(total, wanted, rtol=1e-12)


def refusals() -> list[str]:
    group = groups(ring=2).group("ring")
    assert group is not None
    return [
        raised(ProcessGroupManager.build, ring=2, exchange="copies"),
        raised(ProcessGroupManager.from_group, group, exchange="copies"),
        raised(ProcessGroupManager.from_group, group, exchange="carrier pigeon"),
    ]


def test_what_cannot_copy_is_refused_on_every_rank(world: Callable[[int], World]) -> None:
    for messages in cast("list[list[str]]", world(2).run(refusals)):
        *unable, unknown = messages
        assert all("needs NVIDIA GPUs" in message for message in unable)
        assert "messages, copies; got 'carrier pigeon'" in unknown
