"""One loop that shows every rank's tensor to every rank and brings sums home.

Forward, backward, double ring and early stop are the same `ring_pass` (arXiv:2310.01889, algorithm
1).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

Visit = Callable[[Tensor, int], Tensor | None]
Needs = Callable[[int, int], bool]

_DATA, _SUMS = 0, 1


@dataclass(frozen=True)
class Axis:
    """The ranks along one axis of a topology: this rank's place, their number, their process
    group.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None


class Transfer:
    """Messages under way between the ranks of an axis; `wait` before their tensors are touched."""

    def __init__(self, axis: Axis, tag: int) -> None:
        self._axis, self._tag = axis, tag
        self._ops: list[dist.P2POp] = []
        self._works: list[dist.Work] = []

    def send(self, tensor: Tensor, to: int) -> None:
        self._add(dist.isend, tensor, to)

    def receive(self, tensor: Tensor, source: int) -> Tensor:
        """Returns `tensor`, whose content is undefined until `wait`."""
        self._add(dist.irecv, tensor, source)
        return tensor

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
    """What goes round: elements of the 1-D tensor of each source, its dtype and device, the
    dtype of the sums.
    """

    numel: Callable[[int], int]
    dtype: torch.dtype
    device: torch.device
    sums_dtype: torch.dtype | None = None

    def buffer(self, source: int) -> Tensor:
        return torch.empty(self.numel(source), dtype=self.dtype, device=self.device)

    def sums_buffer(self, source: int) -> Tensor:
        return torch.empty(self.numel(source), dtype=self.sums_dtype, device=self.device)


def ring_pass(
    x: Tensor | None, rings: tuple[Axis, ...], visit: Visit, needs: Needs, message: Message
) -> Tensor | None:
    """Show this rank's 1-D `x` to every rank that needs it, and visit every tensor that this rank
    needs.

    `rings` nest, slowest axis first; ranks are numbered in row-major order over them. `needs(rank,
    source)` must be the same function on every rank: a hop that no later rank needs is not made.
    `visit(tensor, source)` is called once for each needed source, the own one first. Where
    `message.sums_dtype` is set, the 1-D tensors that the visits return (each as long as the tensor
    they saw) are summed along the way in that dtype, in ring order, and the sum over all visits to
    this rank's `x` is returned; None if nobody needed it.
    """
    if not rings:
        return visit(x, 0) if x is not None and needs(0, 0) else None
    ring, inner = rings[0], rings[1:]
    block = prod(axis.size for axis in inner)
    place = 0
    for axis in inner:
        place = place * axis.size + axis.rank

    def show(tensor: Tensor | None, source: int) -> Tensor | None:
        base, own = source * block, ring.rank * block
        return ring_pass(
            tensor,
            inner,
            lambda seen, peer: visit(seen, base + peer),
            lambda rank, peer: needs(own + rank, base + peer),
            replace(message, numel=lambda peer: message.numel(base + peer)),
        )

    def wanted(rank: int, source: int) -> bool:
        return any(needs(rank * block + peer, source * block + place) for peer in range(block))

    routes = [_Route.of(source, ring.size, wanted) for source in range(ring.size)]
    return _one_ring(
        x,
        ring,
        show,
        routes,
        replace(message, numel=lambda source: message.numel(source * block + place)),
    )


def visiting_order(rings: tuple[Axis, ...]) -> list[int]:
    """The sources in the order in which `ring_pass` visits them on this rank."""
    sources = [0]
    for ring in rings:
        hops = [(ring.rank - hop) % ring.size for hop in range(ring.size)]
        sources = [source * ring.size + peer for source in sources for peer in hops]
    return sources


@dataclass(frozen=True)
class _Route:
    """First and last hop at which a source's tensor is needed; it stops at `last`, and sums
    begin at `first`.
    """

    first: int
    last: int

    @classmethod
    def of(cls, source: int, size: int, wanted: Needs) -> "_Route":
        hops = range(size)
        first = next((hop for hop in hops if wanted((source + hop) % size, source)), size)
        last = next((hop for hop in reversed(hops) if wanted((source + hop) % size, source)), 0)
        return cls(first, last)


def _one_ring(
    x: Tensor | None,
    ring: Axis,
    show: Callable[[Tensor | None, int], Tensor | None],
    routes: list[_Route],
    message: Message,
) -> Tensor | None:
    sums = _Sums(ring, routes, message)
    held = x
    for hop in range(ring.size):
        source, following = (ring.rank - hop) % ring.size, (ring.rank - hop - 1) % ring.size
        transfer, arriving = Transfer(ring, _DATA), None
        if held is not None and hop < routes[source].last:
            transfer.send(held, ring.rank + 1)
        if hop < routes[following].last:
            arriving = transfer.receive(message.buffer(following), ring.rank - 1)
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

    def __init__(self, ring: Axis, routes: list[_Route], message: Message) -> None:
        self._ring, self._routes, self._message = ring, routes, message
        self._transfer = Transfer(ring, _SUMS)
        self._arrived: Tensor | None = None
        self._home: Tensor | None = None

    def add(self, seen: Tensor | None, source: int, hop: int) -> None:
        """Add this rank's part to the sum of `source`, pass it on, and start to receive the next
        one.
        """
        ring, routes, message = self._ring, self._routes, self._message
        self._transfer.wait()
        total = self._arrived
        if seen is not None:
            total = seen if total is None else total.add_(seen)
        self._transfer, self._arrived = Transfer(ring, _SUMS), None
        if total is not None and hop < routes[source].last:
            self._transfer.send(total, ring.rank + 1)
        elif total is not None and hop:
            self._transfer.send(total, source)
        elif total is not None:
            self._home = total
        following, own = (ring.rank - hop - 1) % ring.size, routes[ring.rank]
        if routes[following].first <= hop < routes[following].last:
            self._arrived = self._transfer.receive(message.sums_buffer(following), ring.rank - 1)
        if hop == own.last and hop:
            self._home = self._transfer.receive(message.sums_buffer(ring.rank), ring.rank + hop)
        self._transfer.start()

    def finish(self) -> Tensor | None:
        self._transfer.wait()
        return self._home
