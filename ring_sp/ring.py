"""One loop that shows every rank's tensor to every rank and brings sums home.

Forward, backward, double ring and early stop are the same `ring_pass` (arXiv:2310.01889, algorithm
1).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from ring_sp.symmetric import Copies, Memory, Room

Visit = Callable[[Tensor, int], Tensor | None]
Needs = Callable[[int, int], bool]
Place = tuple[tuple[int, int], ...]

DATA, SUMS = 0, 1
"""Tags of messages: a tensor, or the sums that follow it."""
HOME = 0
"""The slot of sums that are complete; those under way take turns with the two after it."""


@dataclass(frozen=True)
class Axis:
    """The ranks along one axis of a topology: this rank's place, their number, their process
    group.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    memory: Memory | None = field(default=None, compare=False)
    """Where messages are copied to, if they are not sent through the group."""

    def transfer(self, tag: int) -> "Transfer | Copies":
        return Copies(self.memory, tag) if self.memory else Transfer(self, tag)


class Transfer:
    """Messages under way between the ranks of an axis; `wait` before their tensors are touched."""

    def __init__(self, axis: Axis, tag: int) -> None:
        self._axis, self._tag = axis, tag
        self._ops: list[dist.P2POp] = []
        self._works: list[dist.Work] = []

    def send(self, tensor: Tensor, to: int, _slot: int) -> None:
        self._add(dist.isend, tensor, to)

    def receive(self, room: Room, source: int, _slot: int) -> Tensor:
        """A tensor whose content is undefined until `wait`."""
        tensor = torch.empty(room.numel, dtype=room.dtype, device=room.device)
        self.fill(tensor, source)
        return tensor

    def fill(self, tensor: Tensor, source: int) -> None:
        """Receive into a dense tensor."""
        self._add(dist.irecv, tensor, source)

    def start(self) -> "Transfer":
        if self._ops:
            self._works = dist.batch_isend_irecv(self._ops)
        return self

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        self._ops, self._works = [], []

    def _add(self, op: Callable[..., dist.Work | None], tensor: Tensor, peer: int) -> None:
        axis = self._axis
        self._ops.append(
            dist.P2POp(op, tensor, group=axis.group, group_peer=peer % axis.size, tag=self._tag)
        )


@dataclass(frozen=True)
class Message:
    """What goes round: elements of the 1-D tensor of each source, its dtype and device; the dtype
    of the sums, and their elements if they are not as many. `blocks` are views of a tensor, or of
    its sums, as [rows, tokens, elements]: for an exchange that sends some tokens of it.
    """

    numel: Callable[[int], int]
    dtype: torch.dtype
    device: torch.device
    sums_dtype: torch.dtype | None = None
    sums_numel: Callable[[int], int] | None = None
    blocks: Callable[[Tensor], list[Tensor]] | None = None

    def numbered(self, source_of: Callable[[int], int]) -> "Message":
        """The same with other numbers for the sources."""
        sums = self.sums_numel or self.numel
        return replace(
            self,
            numel=lambda number: self.numel(source_of(number)),
            sums_numel=lambda number: sums(source_of(number)),
        )

    def reserve(self, memory: Memory, size: int) -> None:
        """Memory for the messages of all sources. Collective where it grows."""
        for tag, numel, dtype in (
            (DATA, self.numel, self.dtype),
            (SUMS, self.sums_numel or self.numel, self.sums_dtype),
        ):
            if dtype is not None:
                memory.reserve(tag, max(map(numel, range(size))) * dtype.itemsize, self.device)

    def room(self, source: int) -> Room:
        return Room(self.numel(source), self.dtype, self.device)

    def sums_room(self, source: int) -> Room:
        assert self.sums_dtype is not None, "there are sums"
        return Room((self.sums_numel or self.numel)(source), self.sums_dtype, self.device)


class Path:
    """How far each tensor goes round nested rings, and between which hops its sums follow it.

    Worked out once for many passes. `rings` nest, slowest axis first; ranks are numbered in
    row-major order over them. `needs(rank, source)` must be the same function on every rank.
    """

    def __init__(self, rings: tuple[Axis, ...], needs: Needs, adds: Needs | None = None) -> None:
        self.rings, self.needs = rings, needs
        self.adds = adds or (lambda rank, source: rank != source and needs(rank, source))
        """Whether a rank adds to the sums of a source: what is its own it keeps."""
        self.block = prod(axis.size for axis in rings[1:])
        """Ranks in the inner rings."""
        self.place = 0
        """This rank's number among them."""
        for axis in rings[1:]:
            self.place = self.place * axis.size + axis.rank
        self._inner: dict[int, Path] = {}
        self._shared: tuple[dict[Place, Path], Place] | None = None

    def share(self, known: "dict[Place, Path]", at: Place = ()) -> "Path":
        """Share what other ranks' paths know alike; `at`: own rank and source in rings around."""
        self._shared = known, at
        first = known.setdefault((*at, (self.place, 0)), self)
        if self.rings:
            self.last, self.sums = first.last, first.sums
        return self

    def inner(self, source: int) -> "Path":
        """The path in the inner rings of the tensors that came from `source` of the outer one."""
        if source not in self._inner:
            own, base = self.rings[0].rank * self.block, source * self.block
            needs, adds = (
                lambda rank, peer, wanted=wanted: wanted(own + rank, base + peer)
                for wanted in (self.needs, self.adds)
            )
            path = self._inner[source] = Path(self.rings[1:], needs, adds)
            if self._shared is not None:
                known, at = self._shared
                path.share(known, (*at, (self.rings[0].rank, source)))
        return self._inner[source]

    @cached_property
    def last(self) -> list[int]:
        """For each source of the outer ring, the last hop at which its tensor is needed."""
        return [max(hops, default=0) for hops in self._hops(self.needs)]

    @cached_property
    def sums(self) -> list[tuple[int, int]]:
        """For each source, the first and the last hop at which a rank adds to its sums."""
        size = self.rings[0].size
        return [(min(hops, default=size), max(hops, default=0)) for hops in self._hops(self.adds)]

    def sent(self, base: int = 0) -> Iterator[tuple[int, int]]:
        """The tag and the source of each message that this rank sends in a pass with sums, in
        order.
        """
        if not self.rings:
            return
        ring = self.rings[0]
        for hop in range(ring.size):
            source = (ring.rank - hop) % ring.size
            block, (first, last) = base + source * self.block, self.sums[source]
            if hop < self.last[source]:
                yield DATA, block + self.place
            if self.rings[1:]:
                yield from self.inner(source).sent(block)
            if last and first <= hop <= last:
                yield SUMS, block + self.place

    def _hops(self, wanted: Needs) -> list[list[int]]:
        """For each source of the outer ring, the hops at which somebody wants it."""
        size, peers = self.rings[0].size, range(self.block)

        def stops(source: int, hop: int) -> bool:
            base, start = (source + hop) % size * self.block, source * self.block + self.place
            return any(wanted(base + peer, start) for peer in peers)

        return [[hop for hop in range(size) if stops(source, hop)] for source in range(size)]


def visiting_order(rings: tuple[Axis, ...]) -> list[int]:
    """The sources in the order in which `ring_pass` visits them on this rank."""
    sources = [0]
    for ring in rings:
        hops = [(ring.rank - hop) % ring.size for hop in range(ring.size)]
        sources = [source * ring.size + peer for source in sources for peer in hops]
    return sources


def ring_pass(x: Tensor | None, path: Path, visit: Visit, message: Message) -> Tensor | None:
    """Show this rank's 1-D `x` to every rank that needs it, and visit every tensor that this rank
    needs. A hop that no later rank needs is not made.

    `visit(tensor, source)` is called once for each needed source, the own one first. Where
    `message.sums_dtype` is set, what the other ranks' visits to `x` return (1-D, of one length) is
    summed along the way in that dtype, in ring order, and the sum is returned; None if no other
    rank needed `x`. What a rank's visit to its own tensor returns is not used.
    """
    if not path.rings:
        seen = visit(x, 0) if x is not None and path.needs(0, 0) else None
        return seen if path.adds(0, 0) else None
    ring, block = path.rings[0], path.block
    outer = message.numbered(lambda source: source * block + path.place)

    def show(tensor: Tensor | None, source: int) -> Tensor | None:
        base = source * block
        inner = message.numbered(lambda peer: base + peer)
        return ring_pass(
            tensor, path.inner(source), lambda seen, peer: visit(seen, base + peer), inner
        )

    if ring.memory is not None:
        outer.reserve(ring.memory, ring.size)
    sums, held = _Sums(path, outer), x
    del x  # A message that nobody else keeps goes once it is sent.
    for hop in range(ring.size):
        source, following = (ring.rank - hop) % ring.size, (ring.rank - hop - 1) % ring.size
        transfer, arriving = ring.transfer(DATA), None
        if held is not None and hop < path.last[source]:
            transfer.send(held, ring.rank + 1, hop % 2)
        if hop < path.last[following]:
            arriving = transfer.receive(outer.room(following), ring.rank - 1, hop % 2)
        transfer.start()
        seen = show(held, source)
        if message.sums_dtype is not None:
            sums.add(seen, source, hop)
        transfer.wait()
        held = arriving
    return sums.finish()


class _Sums:
    """The sums that follow the tensors round a ring, one hop behind, and go home from the last
    visit.
    """

    def __init__(self, path: Path, message: Message) -> None:
        self._path, self._ring, self._message = path, path.rings[0], message
        self._transfer = self._ring.transfer(SUMS)
        self._arrived: Tensor | None = None
        self._home: Tensor | None = None

    def add(self, seen: Tensor | None, source: int, hop: int) -> None:
        """Add this rank's part to the sum of `source`, pass it on, and start to receive the next
        one.
        """
        ring, sums, message = self._ring, self._path.sums, self._message
        self._transfer.wait()
        total = self._arrived
        if seen is not None and total is not None:
            total.add_(seen)
        elif seen is not None:
            total = seen.to(message.sums_dtype)
        self._transfer, self._arrived = ring.transfer(SUMS), None
        if total is not None and hop < sums[source][1]:
            self._transfer.send(total, ring.rank + 1, 1 + hop % 2)
        elif total is not None and hop:
            self._transfer.send(total, source, HOME)
        elif total is not None:
            self._home = total
        following, (_, last) = (ring.rank - hop - 1) % ring.size, sums[ring.rank]
        if sums[following][0] <= hop < sums[following][1]:
            room = message.sums_room(following)
            self._arrived = self._transfer.receive(room, ring.rank - 1, 1 + hop % 2)
        if hop == last and hop:
            room = message.sums_room(ring.rank)
            self._home = self._transfer.receive(room, ring.rank + hop, HOME)
        self._transfer.start()

    def finish(self) -> Tensor | None:
        self._transfer.wait()
        memory = self._ring.memory
        if memory is None:
            return self._home
        home = None if self._home is None else self._home.clone()
        memory.release()
        return home
