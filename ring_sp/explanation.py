"""What a call of ring_attention gets: kernel, exchange, layout, and work and bytes of each rank."""

from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ring_sp.fit import Options, fitting_call
from ring_sp.kernels import KERNELS, choose
from ring_sp.kernels.contract import accumulation_dtype
from ring_sp.passes import QueryWire, Setting, Wire, queries_travel, sums_dtype
from ring_sp.plan import Plan
from ring_sp.ring import DATA, SUMS, Path, paths
from ring_sp.sequence import ShardedSequence
from ring_sp.topology import SEQUENCE, Topology
from ring_sp.ulysses import kv_replication

_COUNTS = {"tokens", "kv_tokens", "pairs", "tiles", "hops", "backward_hops"}
"""The fields of Load that are no bytes."""


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
    hops: int
    """Messages that bring keys and values to the next rank."""
    backward_hops: int
    """Messages that bring what goes round in backward to the next rank."""
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
class Explanation:
    """What a call of `ring_attention` gets; `str` makes a table of it."""

    kernel: str | None
    """None where the kernels that were asked for refuse."""
    refusals: dict[str, str]
    """Why each kernel that cannot serve the call cannot, on this machine."""
    exchange: str
    """Such as "one rank", "ring", "double ring", "all-to-all" or "all-to-all, ring"."""
    sizes: dict[str, int]
    """Ranks along the axes "outer", "ring" and "ulysses"."""
    layout: str
    backward_travels: str
    """What goes round in backward, "keys" or "queries", and their gradients: the fewer bytes."""
    heads: int
    """Query heads of each rank, once Ulysses has traded heads for sequence."""
    kv_heads: int
    """Key heads of each rank then."""
    kv_copies: int
    """How often Ulysses sends each key head, so that each rank has those of its query heads."""
    loads: tuple[Load, ...]
    """Of each rank of the topology."""

    @cached_property
    def total(self) -> Load:
        """The sum over the ranks."""
        return Load(*map(sum, zip(*map(astuple, self.loads), strict=True)))

    @cached_property
    def shares(self) -> tuple[float, ...]:
        """The work of each rank in parts of the busiest rank's."""
        most = max(load.pairs for load in self.loads)
        return tuple(load.pairs / most if most else 1.0 for load in self.loads)

    @property
    def balance(self) -> float:
        """Mean over most work of a rank: the part of the time that nobody waits."""
        return sum(self.shares) / len(self.shares)

    def __str__(self) -> str:
        able = [name for name in KERNELS if name not in self.refusals and name != self.kernel]
        sizes = ", ".join(f"{name} {size}" for name, size in self.sizes.items())
        lines = [
            f"kernel    {self.kernel or 'none: ring_attention raises ValueError'}",
            *(f"          {name} cannot: {reason}" for name, reason in self.refusals.items()),
            *(f"          {name} could, and was not chosen" for name in able),
            f"exchange  {self.exchange} ({sizes}); {self.backward_travels} travel in backward",
            f"layout    {self.layout}; balance {self.balance:.3f}",
            f"heads     {self.heads} a rank, {self.kv_heads} of keys, each sent {self.kv_copies} x",
            "",
        ]
        return "\n".join(lines + _aligned(self._rows()))

    def _rows(self) -> list[tuple[str, ...]]:
        """Ranks with the same load share a row; columns of zeros are left out."""
        shown = [field.name for field in fields(Load) if getattr(self.total, field.name)]
        rows = [("rank", "share", *(name.replace("_", " ") for name in shown))]
        for load, alike in groupby(range(len(self.loads)), lambda rank: self.loads[rank]):
            first, *more = alike
            name = f"{first}-{more[-1]}" if more else f"{first}"
            rows.append((name, f"{self.shares[first]:.3f}", *_cells(load, shown)))
        return [*rows, ("total", "", *_cells(self.total, shown))]


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequence: ShardedSequence,
    kv_sequence: ShardedSequence | None = None,
    *,
    sinks: Tensor | None = None,
    device_type: str | None = None,
    trained: bool = True,
    **options: Any,
) -> Explanation:
    """What `ring_attention` does with the same arguments. Nothing is computed or sent, and
    torch.distributed need not be initialised: `Topology(ring=Axis(rank, size))` will do.

    `trained` if any of its tensors gets a gradient: a kernel may serve only what does not. q, k and
    v may be meta tensors; then, or to ask for another device, give `device_type`. Kernels
    answer for the machine at hand. Bytes are those of a loss that depends on all that the call
    returns; what ranks agree on in the first call of its kind comes on top. Raises what
    `ring_attention` raises, but for kernels that refuse.
    """
    keys = sequence if kv_sequence is None else kv_sequence
    asked = Options(**options)
    where = _device_type(device_type) if device_type else None
    call = fitting_call(q, k, v, sequence, keys, sinks, asked, trained)
    call = replace(call, device_type=where or call.device_type)
    if call.device_type == "meta":
        raise ValueError("meta tensors are nowhere; give device_type, such as 'cuda'")
    kernel, _ = choose(asked.kernel, call)
    refusals: dict[str, str] = {}
    for name in KERNELS:
        refusals.update(choose(name, call)[1])
    topology = sequence.topology
    peers = topology.ulysses.size
    copies = kv_replication(q.shape[2], k.shape[2], peers)
    kv = Wire(q.shape[0], k.shape[2] * copies // peers, k.shape[3], v.shape[3])
    queries = QueryWire(q.shape[0], q.shape[2] // peers, q.shape[3], v.shape[3])
    travels = topology.sums_dtype or sums_dtype(q.dtype, topology.ring_size)
    turned = kernel is not None and queries_travel(
        queries,
        kv,
        Setting(sequence.plan(keys), KERNELS[kernel], call.scale, asked.softcap),
        q.dtype.itemsize,
        travels.itemsize,
    )
    lse_gradient = asked.return_lse or sinks is not None
    messages = _Messages(kv, queries, q.dtype, travels, turned, lse_gradient)
    layouts = dict.fromkeys(map(str, (sequence.layout, keys.layout)))
    return Explanation(
        kernel=kernel,
        refusals=refusals,
        exchange=_exchange(topology),
        sizes={name: getattr(topology, name).size for name in SEQUENCE},
        layout=" with keys ".join(layouts),
        backward_travels="queries" if turned else "keys",
        heads=queries.heads,
        kv_heads=kv.kv_heads,
        kv_copies=copies,
        loads=tuple(_loads(sequence, keys, messages)),
    )


@dataclass(frozen=True)
class _Messages:
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


def _loads(sequence: ShardedSequence, keys: ShardedSequence, messages: _Messages) -> Iterator[Load]:
    plan, topology = sequence.plan(keys), sequence.topology
    back = plan.turned if messages.turned else plan
    sizes = tuple(axis.size for axis in topology.rings)
    ways = zip(paths(sizes, plan.needs), paths(sizes, back.needs), strict=True)
    for station, (path, path_back) in enumerate(ways):
        tiles = [tile for source in range(plan.stations) for tile in plan.meet(station, source)]
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
                hops=len(sent),
                backward_hops=len(sent_back[DATA]),
                forward_kv=sum(sent),
                forward_heads=forward_heads,
                backward_data=sum(sent_back[DATA]),
                backward_sums=sum(sent_back[SUMS]),
                backward_heads=backward_heads,
            )


def _device_type(named: str) -> str:
    try:
        return torch.device(named).type
    except RuntimeError as error:
        raise ValueError(f"device_type must be one of torch's; got {named!r}: {error}") from None


def _exchange(topology: Topology) -> str:
    ring = ("", "ring", "double ring")[len(topology.rings)]
    ring += " by copies" if any(axis.memory for axis in topology.rings) else ""
    trade = "all-to-all" if topology.ulysses.size > 1 else ""
    return ", ".join(filter(None, (trade, ring))) or "one rank"


def _cells(load: Load, shown: list[str]) -> list[str]:
    """Counts as they are, bytes in the largest unit that leaves a digit before the point."""
    values = ((name, getattr(load, name)) for name in shown)
    return [str(value) if name in _COUNTS else _in_units(value) for name, value in values]


def _in_units(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{num_bytes} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
