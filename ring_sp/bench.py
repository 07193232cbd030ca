"""What this machine does: matrix products, copies, links and attention, as a hardware file."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ring_sp.attention import ring_attention
from ring_sp.explanation import explain
from ring_sp.group import Group
from ring_sp.hardware import Hardware, from_datasheet, known
from ring_sp.ring import DATA, Message, Path, ring_pass
from ring_sp.sequence import ShardedSequence
from ring_sp.symmetric import Room


@dataclass(frozen=True)
class Sizes:
    """What is measured with: matrices of `matrix`^2; copies and messages in bytes; tokens a rank,
    heads and head dim of attention; the dtype.
    """

    matrix: int
    copied: int
    message: int
    tokens: int
    heads: tuple[int, int]
    head_dim: int
    dtype: torch.dtype
    other_head_dims: tuple[int, ...] = (64,)
    """Besides which attention alone is measured with."""


GPU = Sizes(8192, 1 << 30, 1 << 28, 1 << 14, (32, 8), 128, torch.bfloat16)
CPU = Sizes(256, 1 << 24, 1 << 20, 256, (4, 2), 32, torch.float32)


@dataclass(frozen=True)
class Hop:
    """A link of the ring: bytes/s each way while all ranks send to the next and receive."""

    source: int
    target: int
    same_host: bool
    rate: float


@dataclass(frozen=True)
class Bench:
    """What was measured. `ring_share` is the time of the group's attention, were it split perfectly
    at one rank's rates, over the time it took, forward and backward.
    """

    hardware: Hardware
    sizes: Sizes
    hops: tuple[Hop, ...]
    kernel: str
    ring_share: float


def measure(group: Group, seq: int | None = None) -> Bench:
    """Measure every rank at once, and keep the slowest. Collective. `seq` tokens of attention on a
    rank; raises ValueError below 1.
    """
    sizes = GPU if group.device.type == "cuda" else CPU
    if seq is not None:
        sizes = replace(sizes, tokens=seq)
    rates = {
        "matmul_rate": _products(group, sizes),
        "copy_rate": _copies(group, sizes),
    }
    if group.device.type == "cuda":
        rates["host_rate"] = _host_copies(group, sizes)
    kernel, *pair = _attention_rates(group, sizes)
    rates |= zip(("forward_rate", "backward_rate"), pair, strict=True)
    rates = {name: min(group.everywhere(rate)) for name, rate in rates.items()}
    by_head_dim = []
    for dim in sizes.other_head_dims:
        _, *own = _attention_rates(group, replace(sizes, head_dim=dim))
        forward, backward = map(min, zip(*group.everywhere(own), strict=True))
        by_head_dim.append((dim, forward, backward))
    hops, share = tuple(_hops(group, sizes)), 1.0
    if group.size > 1:
        _, *parts, work = _attention(group, sizes, alone=False)
        ideal = work / group.size * (4 / rates["forward_rate"] + 10 / rates["backward_rate"])
        share = ideal / max(group.everywhere(sum(parts)))
    machine = replace(_hardware(group, rates, hops), head_dim_rates=tuple(by_head_dim))
    return Bench(machine, sizes, hops, kernel, share)


def lines(found: Bench) -> Iterator[str]:
    """A report of what was measured."""
    machine, sizes = found.hardware, found.sizes
    dtype = str(sizes.dtype).removeprefix("torch.")
    yield f"machine            {machine.name}"
    yield f"matrix products    {machine.matmul_rate / 1e12:,.3f} TFLOP/s, {sizes.matrix}^3, {dtype}"
    yield f"memory             {machine.copy_rate / 1e9:,.1f} GB/s, read and written"
    yield (
        f"attention          {machine.forward_rate / 1e12:,.3f} forward, "
        f"{machine.backward_rate / 1e12:,.3f} backward TFLOP/s, {found.kernel}, causal, "
        f"{sizes.tokens} tokens, {sizes.heads[0]}:{sizes.heads[1]} heads of {sizes.head_dim}"
    )
    for dim, forward, backward in machine.head_dim_rates:
        rates = f"{forward / 1e12:,.3f} forward, {backward / 1e12:,.3f} backward TFLOP/s"
        yield f"  heads of {dim:<8} {rates}"
    if "host_rate" in machine.measured:
        yield f"host's memory      {machine.host_rate / 1e9:,.1f} GB/s each way, both at once"
    for hop in found.hops:
        where = "" if hop.same_host else ", between hosts"
        yield f"hop {hop.source} -> {hop.target:<10} {hop.rate / 1e9:,.2f} GB/s each way{where}"
    if found.hops:
        yield f"ring attention     {found.ring_share:.3f} of a perfect split"
    else:
        yield "links              one rank has none: run under torchrun --nproc_per_node N"
    assumed = [name for name, source in machine.sources.items() if source != "measured"]
    if assumed:
        yield f"not measured       {', '.join(assumed)}: assumed, until more ranks take part"


def _products(group: Group, sizes: Sizes) -> float:
    """FLOP/s. Random data: zeros take less power, and run faster than any model."""
    shape = (sizes.matrix, sizes.matrix)
    a, b = (torch.randn(shape, device=group.device, dtype=sizes.dtype) for _ in range(2))
    return 10 * 2 * sizes.matrix**3 / group.seconds(_times(10, lambda: a @ b))


def _copies(group: Group, sizes: Sizes) -> float:
    """bytes/s, read and written."""
    source = torch.ones(sizes.copied, dtype=torch.uint8, device=group.device)
    into = torch.empty_like(source)
    return 10 * 2 * sizes.copied / group.seconds(_times(10, lambda: into.copy_(source)))


def _host_copies(group: Group, sizes: Sizes) -> float:
    """bytes/s to the host's pinned memory, while as much comes back."""
    there, back = (torch.empty(sizes.copied, dtype=torch.uint8, pin_memory=True) for _ in range(2))
    source, into = (torch.empty(sizes.copied, dtype=torch.uint8, device=group.device) for _ in "ab")
    streams = [torch.cuda.Stream(group.device) for _ in range(2)]

    def step() -> None:
        pairs = (there, source), (into, back)
        for stream, (target, given) in zip(streams, pairs, strict=True):
            with torch.cuda.stream(stream):
                target.copy_(given, non_blocking=True)

    return sizes.copied / group.seconds(step)


def _attention_rates(group: Group, sizes: Sizes) -> tuple[str, float, float]:
    """The kernel, and FLOP/s of its forward and of its backward."""
    kernel, forward, backward, work = _attention(group, sizes, alone=True)
    return kernel, 4 * work / forward, 10 * work / backward


def _attention(group: Group, sizes: Sizes, alone: bool) -> tuple[str, float, float, float]:
    """The kernel; seconds of a forward, and of a backward; head dim times heads times visible
    pairs, of the whole sequence.
    """
    ranks = 1 if alone else group.size
    topology = None if alone else group.topology
    sequence = ShardedSequence(sizes.tokens * ranks, topology)
    heads, kv_heads = sizes.heads
    make = torch.Generator(group.device).manual_seed(group.rank)
    q, k, v, dout = (
        torch.randn(
            (1, sequence.local_len, n, sizes.head_dim),
            generator=make,
            device=group.device,
            dtype=sizes.dtype,
        )
        for n in (heads, kv_heads, kv_heads, heads)
    )
    told = explain(q, k, v, sequence)
    trained = [x.requires_grad_() for x in (q, k, v)]

    def forward() -> Tensor:
        with torch.no_grad():
            return ring_attention(q, k, v, sequence)

    out = ring_attention(q, k, v, sequence)

    def backward() -> object:
        return torch.autograd.grad(out, trained, dout, retain_graph=True)

    work = float(heads * sizes.head_dim * told.total.pairs)
    return str(told.kernel), group.seconds(forward), group.seconds(backward), work


def _hops(group: Group, sizes: Sizes) -> Iterator[Hop]:
    """The link from each rank to the next, all at work at once. What arrives is checked."""
    if group.size == 1:
        return
    message = torch.full((sizes.message,), group.rank, dtype=torch.uint8, device=group.device)
    axis, previous = group.topology.ring, (group.rank - 1) % group.size
    seen: list[Tensor] = []

    def step() -> None:
        transfer = axis.transfer(DATA)
        transfer.send(message, axis.rank + 1, 0)
        room = Room(sizes.message, torch.uint8, group.device)
        arrived = transfer.receive(room, axis.rank - 1, 0)
        transfer.start().wait()
        seen[:] = [arrived]

    def whole_pass() -> None:
        wanted = Message(lambda _: sizes.message, torch.uint8, group.device)
        path = Path((axis,), lambda rank, source: (rank - source) % group.size <= 1)
        ring_pass(message, path, lambda tensor, _: seen.__setitem__(slice(None), [tensor]), wanted)

    # Slots of copies are made and left free by a pass.
    seconds = group.seconds(step if axis.memory is None else whole_pass)
    if not (seen[0] == previous).all():
        raise ValueError(f"rank {group.rank} did not get what rank {previous} sent")
    rates = group.everywhere(sizes.message / seconds)
    for target, rate in enumerate(rates):
        source = (target - 1) % group.size
        yield Hop(source, target, group.hosts[source] == group.hosts[target], rate)


def _hardware(group: Group, rates: dict[str, float], hops: tuple[Hop, ...]) -> Hardware:
    """The datasheet of the GPU at hand, with its memory and the rates that were measured. Where
    there is none the peak is what products reached, so that MFU counts from there.
    """
    name, memory = "cpu", 16e9
    if group.device.type == "cuda":
        properties = torch.cuda.get_device_properties(group.device)
        name, memory = properties.name, float(properties.total_memory)
    for key, same in (("link_rate", True), ("network_rate", False)):
        found = [hop.rate for hop in hops if hop.same_host is same]
        rates = rates | ({key: min(found)} if found else {})
    sheet = next((x for key, x in known().items() if key in name.lower()), None)
    if sheet is not None:
        measured = tuple(dict.fromkeys((*rates, *sheet.measured)))
        # An A100 may have 40 GB; of more than the sheet's, the rest is the driver's.
        own = {"name": name, "measured": measured, "memory_bytes": min(memory, sheet.memory_bytes)}
        return replace(sheet, **{**rates, **own})  # type: ignore[arg-type]
    link = rates.get("link_rate", 1e9)
    return from_datasheet(
        name,
        (rates["matmul_rate"], memory, rates["copy_rate"]),
        (link, rates.get("network_rate", link), group.hosts.count(group.hosts[0])),
        rates,
    )


def _times(number: int, call: Callable[[], object]) -> Callable[[], None]:
    def step() -> None:
        for _ in range(number):
            call()

    return step
