"""What falls to each rank in a call: its work, and the bytes that it sends."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from ring_sp.gather import Gathering
from ring_sp.kernels.contract import accumulation_dtype
from ring_sp.passes import QueryWire, Wire
from ring_sp.plan import Plan
from ring_sp.ring import DATA, SUMS, Axis, Needs, Path, Place
from ring_sp.sequence import ShardedSequence


@dataclass(frozen=True)
class Load:
    """What falls to one rank. Bytes are those that it sends to other ranks in one call."""

    tokens: int
    """Of its queries."""
    kv_tokens: int
    pairs: int
    """Pairs of a query and a key that see each other, in each of the rank's heads."""
    tiles: int
    """Rectangles in which they lie: the smaller and the more, the slower for equal pairs."""
    visits: int
    """Times that the kernel is called in a pass."""
    hops: int
    """Messages that bring keys and values to the next rank; if gathered, ranks that get some."""
    backward_hops: int
    """The same of what travels in backward."""
    forward_kv: int
    forward_heads: int
    """In the all-to-alls of Ulysses."""
    backward_data: int
    """What goes round, see `Explanation.backward_travels`."""
    backward_sums: int
    """Gradients of what goes round, under way and home."""
    backward_heads: int

    @property
    def forward_bytes(self) -> int:
        """All bytes of the forward pass."""
        return self.forward_kv + self.forward_heads

    @property
    def backward_bytes(self) -> int:
        """All bytes of the backward pass."""
        return self.backward_data + self.backward_sums + self.backward_heads


@dataclass(frozen=True)
class Messages:
    """What travels: a station's keys and values and its queries, of a dtype, and the sums of
    another; whether the queries go round in backward, and whether lse has a gradient.
    """

    kv: Wire
    queries: QueryWire
    dtype: torch.dtype
    sums_dtype: torch.dtype
    turned: bool
    lse_gradient: bool

    def ringed(self, path: Path, plan: Plan, turned: bool) -> dict[int, list[int]]:
        """Bytes of each message with DATA, and of each with SUMS, in a pass with sums."""
        size, sums_size = self.dtype.itemsize, self.sums_dtype.itemsize
        sent: dict[int, list[int]] = {DATA: [], SUMS: []}
        for tag, source in path.sent():
            q_len, kv_len = plan.q_lens[source], plan.kv_lens[source]
            if turned and tag == DATA:
                num_bytes = self.queries.numel(q_len, size)
            elif turned:
                num_bytes = self.queries.dq_numel(q_len) * sums_size
            else:
                num_bytes = self.kv.numel(kv_len) * (size if tag == DATA else sums_size)
            sent[tag].append(num_bytes)
        return sent

    def gathered(self, gathering: Gathering, rank: int) -> dict[int, list[int]]:
        """The same where a station's keys, and their gradients, go straight to others."""
        sizes = {DATA: self.dtype.itemsize, SUMS: self.sums_dtype.itemsize}
        sent: dict[int, list[int]] = {DATA: [], SUMS: []}
        for tag, tokens in gathering.sent(rank):
            sent[tag].append(self.kv.numel(tokens) * sizes[tag])
        return sent

    def traded(self, q_tokens: tuple[int, int], kv_tokens: tuple[int, int]) -> tuple[int, int]:
        """Bytes in the all-to-alls of forward and backward, of tokens that go to heads and of
        tokens that go to the sequence.
        """
        kv, size = self.kv, self.dtype.itemsize
        queries = kv.batch * self.queries.heads * kv.head_dim * size
        results = kv.batch * self.queries.heads * kv.v_head_dim * size
        lse = kv.batch * self.queries.heads * accumulation_dtype(self.dtype).itemsize
        dlse = lse if self.lse_gradient else 0
        keys = kv.numel(1) * size
        (q_there, q_back), (kv_there, kv_back) = q_tokens, kv_tokens
        return (
            q_there * queries + kv_there * keys + q_back * (results + lse),
            q_there * (results + dlse) + q_back * queries + kv_back * keys,
        )


def paths(sizes: tuple[int, ...], needs: Needs) -> Iterator[Path]:
    """The path of each rank of nested rings, in order; what several know alike is worked out
    once.
    """
    known: dict[Place, Path] = {}
    for place in product(*map(range, sizes)):
        yield Path(tuple(map(Axis, place, sizes)), needs).share(known)


def loads(sequence: ShardedSequence, keys: ShardedSequence, messages: Messages) -> Iterator[Load]:
    """Of each rank, in order."""
    plan, topology = sequence.plan(keys), sequence.topology
    back = plan.turned if messages.turned else plan
    sizes = tuple(axis.size for axis in topology.rings)
    ways = zip(paths(sizes, plan.needs), paths(sizes, back.needs), strict=True)
    for station, (path, path_back) in enumerate(ways):
        visits = plan.visits(station).values()
        tiles = [tile for visit in visits for tile in plan.regions.tiles(*visit)]
        if plan.gathering is not None:
            sent_back = messages.gathered(plan.gathering, station)
            sent = sent_back[DATA]
        else:
            sent = messages.ringed(path, plan, False)[DATA]
            sent_back = messages.ringed(path_back, plan, messages.turned)
        peers = topology.ulysses.size
        at = slice(station * peers, (station + 1) * peers)
        for own, kv_own in zip(sequence.lens[at], keys.lens[at], strict=True):
            # A rank sends its tokens to each other peer, and gets back what it computed for them.
            forward_heads, backward_heads = messages.traded(
                ((peers - 1) * own, sum(sequence.lens[at]) - own),
                ((peers - 1) * kv_own, sum(keys.lens[at]) - kv_own),
            )
            yield Load(
                tokens=own,
                kv_tokens=kv_own,
                pairs=sum(tile.area for tile in tiles),
                tiles=len(tiles),
                visits=len(visits),
                hops=len(sent),
                backward_hops=len(sent_back[DATA]),
                forward_kv=sum(sent),
                forward_heads=forward_heads,
                backward_data=sum(sent_back[DATA]),
                backward_sums=sum(sent_back[SUMS]),
                backward_heads=backward_heads,
            )
