"""The flags and slots of copies, with threads for the streams of all ranks."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from queue import SimpleQueue
from random import Random
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import World
from ranks import groups, raised
from torch import Tensor

from ring_sp import ProcessGroupManager, ShardedSequence, Topology, explain, symmetric
from ring_sp.ring import Axis, Message, Path, ring_pass
from ring_sp.symmetric import SLOTS, Memory, Room

PATIENCE = 20.0
"""Seconds after which a wait is a deadlock."""

local = threading.local()

Table = list[list[bool]]
"""[rank][source]: whether a rank needs a source."""


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

    def wait_stream(self, other: Stream | Compute) -> None:
        self.wait_event(other.record_event())

    def wait_event(self, event: threading.Event) -> None:
        self.add(lambda: event.wait(PATIENCE))

    def record_event(self) -> threading.Event:
        event = threading.Event()
        self.add(event.set)
        return event


class Compute:
    """A current stream that is the main thread of a rank: what it has called is done."""

    def wait_event(self, event: threading.Event) -> None:
        assert event.wait(PATIENCE), "a transfer never ends"

    def record_event(self) -> threading.Event:
        event = threading.Event()
        event.set()
        return event


@contextmanager
def streaming(stream: Stream) -> Iterator[None]:
    local.stream = stream
    yield
    del local.stream


class Shared:
    """What the ranks of an axis see of each other."""

    def __init__(self, size: int, numel: int, nested: bool = False) -> None:
        self.slots = {
            (rank, tag, slot): torch.full((numel,), torch.nan, dtype=torch.float64)
            for rank in range(size)
            for tag, count in enumerate(SLOTS if nested or size > 2 else (1, 1))
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
        self._streams = cast(Any, [Stream(rank * len(SLOTS) + tag) for tag in range(len(SLOTS))])
        self._last = None

    def reserve(self, tag: int, num_bytes: int, device: torch.device) -> None:
        pass

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
    rank: int, rings: tuple[Axis, ...], table: Table, turns: int
) -> list[tuple[bool, Tensor | None]]:
    """For each turn whether all that this rank saw stayed as it should be, and its sums."""
    random, found = Random(rank), []
    path = Path(rings, lambda reader, source: table[reader][source])
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
    return SimpleNamespace(
        current_stream=lambda: getattr(local, "compute", Compute()),
        stream=streaming,
        is_current_stream_capturing=lambda: False,
    )


def on_threads(size: int, run: Callable[[int], object]) -> None:
    """Run all ranks at once, each in a thread."""
    with mock.patch.object(symmetric.torch, "cuda", fake_cuda()):
        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def drawn(size: int, share: float) -> Table:
    random = Random(size)
    return [[random.random() < share for _ in range(size)] for _ in range(size)]


@pytest.mark.parametrize("shape", [(2,), (3,), (4,), (8,), (2, 2), (3, 2), (2, 3)], ids=str)
@pytest.mark.parametrize("kind", ["all", "some", "causal"])
def test_nothing_is_overwritten_before_it_is_read_and_all_sums_come_home(
    shape: tuple[int, ...], kind: str
) -> None:
    size, turns, nested = prod(shape), 6 if len(shape) == 1 else 4, len(shape) > 1
    causal = [[rank >= source for source in range(size)] for rank in range(size)]
    table = causal if kind == "causal" else drawn(size, 1.0 if kind == "all" else 0.6)
    inner = shape[-1]
    outers = [Shared(shape[0], 4 + size, nested) for _ in range(inner)]
    inners = [Shared(inner, 4 + size, nested) for _ in range(size // inner)]
    found: dict[int, list[tuple[bool, Tensor | None]]] = {}

    def run(rank: int) -> None:
        block, place = divmod(rank, inner)
        rings = [Axis(place, inner, None, Threads(place, inner, inners[block]))]
        if nested:
            own = Threads(block, shape[0], outers[place])
            rings.insert(0, Axis(block, shape[0], None, own))
        found[rank] = one_rank(rank, tuple(rings), table, turns)

    on_threads(size, run)
    assert sorted(found) == list(range(size)), "a rank gave up"
    for rank, turned in found.items():
        readers = [r for r in range(size) if r != rank and table[r][rank]]
        for turn, (intact, total) in enumerate(turned):
            assert intact, (rank, turn)
            wanted = sum(r + 2 for r in readers) * content(turn, rank)
            assert (total is not None) == bool(readers and turn % 2)
            assert total is None or torch.allclose(total, wanted, rtol=1e-12)


@pytest.mark.parametrize("num_streams", [1, 2])
def test_passes_on_several_streams_leave_each_other_what_they_read(num_streams: int) -> None:
    """Kernels run some time after they were asked for, those of one rank late."""
    size, wrong = 3, []
    shared = Shared(size, 16)

    def run(rank: int) -> None:
        ring = Axis(rank, size, None, Threads(rank, size, shared))
        computes = [Stream(rank) for _ in range(num_streams)]
        for turn in range(4):
            compute = local.compute = computes[turn % num_streams]

            def visit(tensor: Tensor, source: int, turn: int = turn) -> None:
                def read() -> None:
                    time.sleep(0.05 if rank == turn % size else 0)
                    if not torch.equal(tensor, content(turn, source)):
                        wrong.append((rank, turn, source))

                local.compute.add(read)

            message = Message(lambda source: 4 + source, torch.float64, torch.device("cpu"))
            ring_pass(content(turn, rank), Path((ring,), lambda *_: True), visit, message)
            assert compute is local.compute
        for each in computes:
            assert each.record_event().wait(PATIENCE)

    on_threads(size, run)
    assert not wrong


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
        assert "gather, gather:N; got 'carrier pigeon'" in unknown


def refused_over_hosts() -> list[str]:
    """Two groups of two ranks; only the first spans hosts."""
    rank = dist.get_rank()
    group = groups(ring=2).group("ring")
    assert group is not None
    host = mock.patch.object(symmetric, "gethostname", return_value="a" if rank == 0 else "b")
    with host, mock.patch.object(symmetric, "_unavailable", return_value=None):
        return [
            raised(ProcessGroupManager.build, ring=2, exchange="copies"),
            raised(ProcessGroupManager.from_group, group, outer=2, exchange="copies"),
        ]


def test_a_ring_that_spans_hosts_is_refused_on_all_ranks_that_would_wait(
    world: Callable[[int], World],
) -> None:
    for messages in world(4).run(refused_over_hosts):
        assert all("all GPUs of a ring in one host" in message for message in messages)


def test_copies_are_explained_and_want_a_gpu() -> None:
    ring = Axis(0, 2, None, Threads(0, 2, Shared(2, 1)))
    seq = ShardedSequence(64, Topology(ring=ring))
    q = torch.empty(1, 32, 2, 64, device="meta", dtype=torch.bfloat16)
    assert explain(q, q, q, seq, device_type="cuda").exchange == "ring by copies"
    x = torch.zeros(1, 32, 2, 64)
    assert "'copies' moves tensors on GPUs; got cpu" in raised(explain, x, x, x, seq)
