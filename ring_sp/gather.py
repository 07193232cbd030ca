"""Show every rank's tensor to every rank, several sources at a time: fewer and larger visits.

Where stations are short, a ring's visits are small kernels, and their launches and folds take as
long as their work. Here a rank receives from several sources at once, straight from their owners,
the stretch of tokens that it sees of each, side by side in one tensor. Stretches are sorted by
position: those that follow each other, such as the front chunks of zigzag shards, meet the queries
in few large tiles. Sums go straight home, and are added there in one order.
"""

from collections.abc import Callable, Iterator
from functools import cache
from itertools import accumulate, pairwise
from math import isqrt

import torch
from torch import Tensor

from ring_sp.layout import Shard, joined, part
from ring_sp.ring import DATA, SUMS, Axis, Message, Transfer, Visit

Seen = Callable[[int, int], range]
"""The shortest stretch of a source's tokens that holds all that a rank sees, in slots."""


def default_sources(size: int) -> int:
    """The root of the other ranks' number, rounded up: as many visits as sources in each.

    With g sources at a time, what each visit costs beside its work falls as 1 / g, and what no
    visit hides grows as g: the first sources arrive while a rank looks at its own tensor only, and
    the last sums go home alone. Their sum is least about the root, where memory, g sources visited
    and g on their way, still falls with more ranks for one sequence.
    """
    return 1 + isqrt(max(size - 2, 0))


class Gathering:
    """Who receives what of whom in which step, worked out once for many passes.

    In a step each rank receives from the next `num_sources` ranks before it on the axis. `shards`
    are the positions of each rank's tokens. `seen` must be the same function on every rank.
    """

    def __init__(self, axis: Axis, num_sources: int, shards: tuple[Shard, ...], seen: Seen) -> None:
        self.axis, self.shards, self.seen = axis, shards, cache(seen)
        self.steps = [
            range(first, min(first + num_sources, axis.size))
            for first in range(1, axis.size, num_sources)
        ]
        """For each step how far away its sources are."""
        self._places: dict[tuple[int, int], dict[int, slice]] = {}

    def number(self, rank: int, step: int) -> int:
        """What the visit of a step goes by: the nearest source of the step."""
        return (rank - self.steps[step][0]) % self.axis.size

    def places(self, rank: int, step: int) -> dict[int, slice]:
        """Where the tokens of each source that a rank sees lie in the tensor of a step."""
        if (rank, step) not in self._places:
            near = [(rank - distance) % self.axis.size for distance in self.steps[step]]
            sources = [source for source in near if self.seen(rank, source)]
            sources.sort(key=lambda source: self._stretch(rank, source)[0].start)
            cuts = accumulate((len(self.seen(rank, source)) for source in sources), initial=0)
            places = [slice(*each) for each in pairwise(cuts)]
            self._places[rank, step] = dict(zip(sources, places, strict=True))
        return self._places[rank, step]

    def visits(self, rank: int) -> dict[int, Shard]:
        """The number of each visit of a rank, in order, and the positions of its tokens; what is
        the rank's own comes first, by the number of the rank.
        """
        found = {rank: self.shards[rank]} if self.seen(rank, rank) else {}
        for step in range(len(self.steps)):
            sources = self.places(rank, step)
            spans = [span for source in sources for span in self._stretch(rank, source)]
            if spans:
                found[self.number(rank, step)] = joined(tuple(spans))
        return found

    def pairs(self, rank: int, step: int) -> Iterator[tuple[int, int]]:
        """In one order for messages: a rank that receives from this one in a step, if it sees
        anything of it, and one that this one receives from.
        """
        for distance in self.steps[step]:
            yield (rank + distance) % self.axis.size, (rank - distance) % self.axis.size

    def sent(self, rank: int) -> Iterator[tuple[int, int]]:
        """The tag and the tokens of each part that a rank sends in a pass with sums."""
        for step in range(len(self.steps)):
            for reader, source in self.pairs(rank, step):
                for tag, tokens in (
                    (DATA, self.seen(reader, rank)),
                    (SUMS, self.seen(rank, source)),
                ):
                    if tokens:
                        yield tag, len(tokens)

    def _stretch(self, rank: int, source: int) -> Shard:
        tokens = self.seen(rank, source)
        return part(self.shards[source], tokens.start, tokens.stop)


def gather_pass(x: Tensor, gathering: Gathering, visit: Visit, message: Message) -> Tensor | None:
    """Show of this rank's 1-D `x` to every other rank what it sees, and visit what this rank sees:
    its own tensor first, then those of each step's sources as one.

    `visit(tensor, number)` is called as `gathering.visits` says, while what comes next is under
    way. Where `message.sums_dtype` is set, what other ranks' visits return for tokens of `x` comes
    home in that dtype and is summed in float32 (float64 for float64), nearest rank first; the sum
    is returned, and None if no other rank saw any. What a visit to the own tensor returns is not
    used.
    """
    rank, steps = gathering.axis.rank, len(gathering.steps)
    sums = _Sums(x, gathering, message)
    arriving = _fetch(x, gathering, message, 0) if steps else None
    if gathering.seen(rank, rank):
        visit(x, rank)
    for step in range(steps):
        assert arriving is not None, "a step follows"
        transfer, held = arriving
        transfer.wait()
        arriving = _fetch(x, gathering, message, step + 1) if step + 1 < steps else None
        seen = None if held is None else visit(held, gathering.number(rank, step))
        if message.sums_dtype is not None:
            sums.send(seen, step)
    return sums.finish()


def _fetch(
    x: Tensor, gathering: Gathering, message: Message, step: int
) -> tuple[Transfer, Tensor | None]:
    """Start to send what others see of `x`, and to receive the tensor of a step, if there is
    one.
    """
    rank, places = gathering.axis.rank, gathering.places(gathering.axis.rank, step)
    transfer, held = Transfer(gathering.axis, DATA), None
    if places:
        tokens = max(place.stop for place in places.values())
        held = x.new_empty(tokens * _width(x, message))
    for reader, source in gathering.pairs(rank, step):
        tokens_there = gathering.seen(reader, rank)
        if tokens_there:
            for piece in _pieces(x, message, _slice(tokens_there)):
                transfer.send(piece, reader, 0)
        if held is not None and source in places:
            for piece in _pieces(held, message, places[source]):
                transfer.fill(piece, source)
    return transfer.start(), held


class _Sums:
    """The sums of gradients on their way home, and what has come home."""

    def __init__(self, x: Tensor, gathering: Gathering, message: Message) -> None:
        self._x, self._gathering, self._message = x, gathering, message
        self._transfer = Transfer(gathering.axis, SUMS)
        self._arriving: list[tuple[Tensor, slice]] = []
        self._total: Tensor | None = None

    def send(self, seen: Tensor | None, step: int) -> None:
        """Send what a visit gave to its sources, receive what others give to `x` in this step, and
        meanwhile add what came in the step before.
        """
        gathering, message, rank = self._gathering, self._message, self._gathering.axis.rank
        places, width = gathering.places(rank, step), _width(self._x, message)
        transfer, arriving = Transfer(gathering.axis, SUMS), []
        seen = None if seen is None else seen.to(message.sums_dtype)
        for reader, source in gathering.pairs(rank, step):
            if seen is not None and source in places:
                for piece in _pieces(seen, message, places[source]):
                    transfer.send(piece, source, 0)
            tokens = gathering.seen(reader, rank)
            if tokens:
                part_sum = self._x.new_empty(len(tokens) * width, dtype=message.sums_dtype)
                for piece in _pieces(part_sum, message, slice(None)):
                    transfer.fill(piece, reader)
                arriving.append((part_sum, _slice(tokens)))
        transfer.start()
        self._add()
        self._transfer, self._arriving = transfer, arriving

    def finish(self) -> Tensor | None:
        self._add()
        return self._total

    def _add(self) -> None:
        """Add what has arrived."""
        self._transfer.wait()
        for part_sum, at in self._arriving:
            dtype = torch.promote_types(part_sum.dtype, torch.float32)
            if self._total is None and part_sum.numel() == self._x.numel():
                self._total = part_sum
                continue
            if self._total is None:
                self._total = torch.zeros_like(self._x, dtype=dtype)
            self._total = self._total.to(dtype)
            blocks = map(_blocks, (self._total, part_sum), (self._message,) * 2)
            for own, arrived in zip(*blocks, strict=True):
                own[:, at] += arrived
        self._arriving = []


def _blocks(tensor: Tensor, message: Message) -> list[Tensor]:
    assert message.blocks is not None, "what is gathered says where its tokens are"
    return message.blocks(tensor)


def _pieces(tensor: Tensor, message: Message, tokens: slice) -> Iterator[Tensor]:
    """Dense views of some tokens of a tensor, which together are all that it has of them."""
    for block in _blocks(tensor, message):
        yield from block[:, tokens].unbind(0)


def _width(tensor: Tensor, message: Message) -> int:
    """Elements of a token."""
    return sum(block[:, :1].numel() for block in _blocks(tensor, message))


def _slice(tokens: range) -> slice:
    return slice(tokens.start, tokens.stop)
