"""What a call of ring_attention gets: kernel, exchange, layout, and work and bytes of each rank."""

from dataclasses import astuple, dataclass, fields, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ring_sp.fit import Options, fitting_call
from ring_sp.kernels import KERNELS, choose
from ring_sp.loads import Load, Messages, loads
from ring_sp.passes import QueryWire, Setting, Wire, queries_travel, sums_dtype
from ring_sp.sequence import ShardedSequence
from ring_sp.topology import SEQUENCE, Topology
from ring_sp.ulysses import kv_replication

_COUNTS = {"tokens", "kv_tokens", "pairs", "tiles", "visits", "hops", "backward_hops"}
"""The fields of Load that are no bytes."""


@dataclass(frozen=True)
class Explanation:
    """What a call of `ring_attention` gets; `str` makes a table of it."""

    kernel: str | None
    """None where the kernels that were asked for refuse."""
    refusals: dict[str, str]
    """Why each kernel that cannot serve the call cannot, on this machine."""
    exchange: str
    """Such as "one rank", "ring", "double ring", "all-to-all", "all-to-all, ring" or "gather:2"."""
    sizes: dict[str, int]
    """Ranks along the axes "outer", "ring" and "ulysses"."""
    layout: str
    backward_travels: str
    """What goes round in backward, "keys" or "queries", and their gradients: the fewer bytes, but
    keys where sources are gathered.
    """
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
            f"exchange  {self.exchange} ({sizes}); {self.backward_travels} travel in backward"
            + (", as queries are never gathered" if "gather" in self.exchange else ""),
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
    plan = sequence.plan(keys)
    travels = topology.sums_dtype or sums_dtype(q.dtype, plan)
    turned = kernel is not None and queries_travel(
        queries,
        kv,
        Setting(plan, KERNELS[kernel], call.scale, asked.softcap),
        q.dtype.itemsize,
        travels.itemsize,
    )
    lse_gradient = asked.return_lse or sinks is not None
    messages = Messages(kv, queries, q.dtype, travels, turned, lse_gradient)
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
        loads=tuple(loads(sequence, keys, messages)),
    )


def _device_type(named: str) -> str:
    try:
        return torch.device(named).type
    except RuntimeError as error:
        raise ValueError(f"device_type must be one of torch's; got {named!r}: {error}") from None


def _exchange(topology: Topology) -> str:
    ring = ("", "ring", "double ring")[len(topology.rings)]
    ring += " by copies" if topology.exchange == "copies" else ""
    ring = ring if topology.gather is None else topology.exchange
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
