"""Time the passes of one rank of a larger ring on one GPU, the other ranks' keys at hand.

    torchrun --nproc_per_node 1 examples/benchmarks/one_rank.py --graphs --json one_rank.json

What a ring of N loses without any transfer: to kernels that are small, their launches, folds and
sums. The ideal is the fastest kernel on the whole problem, divided by N, in this run; sources are
visited one at a time, as in a ring, or gathered. Milliseconds of forward and of backward are
medians over turns of the slower of the first and the last rank; all take turns. With --graphs each
is also replayed from a CUDA graph, which leaves out the host's time. Causal zigzag, batch 1, bf16,
head dim 128. On a CPU try --seq-lens 256 --kernels reference --heads 4 --kv-heads 2.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import kernels
import peers
import torch
import torch.distributed as dist
from attention import HEAD_DIM, Case, milliseconds
from torch import Tensor

from ring_sp import ShardedSequence, Topology
from ring_sp.exchanges import gathered
from ring_sp.kernels import KERNELS
from ring_sp.kernels.contract import Rows
from ring_sp.layout import shard_len
from ring_sp.passes import Setting, Wire, attend, gradients
from ring_sp.plan import Plan
from ring_sp.ring import Axis, Message, Visit

WAYS = ("forward", "backward")
Result = dict[str, Any]


@dataclass(frozen=True)
class AtHand:
    """An exchange in which what other ranks send is there, and what goes to them stays here."""

    plan: Plan
    wire: Wire
    seen: dict[int, Tensor]
    """The keys and values of each visit."""

    def show(self, x: Tensor, visit: Visit, message: Message) -> Tensor | None:
        """Every visit, and the additions to sums that a rank makes on their way."""
        started, dtype = False, message.sums_dtype
        for number in self.plan.own_visits:
            own = number == self.plan.rank
            gradient = visit(x if own else self.seen[number], number)
            if own or gradient is None or dtype is None or self.plan.gathering is not None:
                continue
            if started:
                torch.empty_like(gradient, dtype=dtype).add_(gradient)
            else:
                # The first other rank starts the sum of a source; the rest add to what arrives.
                gradient.to(dtype)
            started = True
        if dtype is None:
            return None
        if self.plan.gathering is not None:
            return self.gathered(x, dtype)
        return torch.empty_like(x, dtype=dtype)

    def gathered(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """What other ranks' parts of a gradient make, each added where it belongs."""
        gathering, rank = self.plan.gathering, self.plan.rank
        assert gathering is not None
        total, part = torch.zeros_like(x, dtype=torch.float32), x.to(dtype)
        for reader in range(gathering.axis.size):
            tokens = gathering.seen(reader, rank)
            if reader != rank and tokens:
                at = slice(tokens.start, tokens.stop)
                blocks = zip(self.wire.blocks(total), self.wire.blocks(part), strict=True)
                for sums, theirs in blocks:
                    sums[:, at] += theirs[:, at]
        return total


def one_rank(
    case: Case, kernel: str, exchange: str, axis: Axis, device: torch.device
) -> tuple[peers.Step, peers.Step]:
    """Forward and backward of a rank of a ring."""
    topology = Topology(ring=axis, gather=gathered(exchange, axis.size))
    sequence = ShardedSequence(case.seq_len, topology, case.mask, case.layout)
    plan, heads = sequence.plan(), (case.heads, case.kv_heads, case.kv_heads, case.heads)
    q, k, v, dout = peers.drawn(heads, sequence.local_len, HEAD_DIM, device)
    wire = Wire.of(k, v)
    seen = {
        number: torch.randn(wire.numel(shard_len(keys)), device=device, dtype=k.dtype)
        for number, (_, keys) in plan.own_visits.items()
    }
    at_hand, kv = AtHand(plan, wire, seen), wire.join(k, v)
    setting = Setting(plan, KERNELS[kernel], HEAD_DIM**-0.5, None, exchange=at_hand.show)

    def forward() -> tuple[Tensor, Tensor]:
        return attend(q, kv, wire, setting)

    out, lse = forward()
    return forward, lambda: gradients(q, kv, wire, Rows(out, lse, dout), setting)


@dataclass(frozen=True)
class Replay:
    """A step as a CUDA graph; the graph's kernels read tensors that the step holds."""

    step: peers.Step
    graph: torch.cuda.CUDAGraph

    def __call__(self) -> None:
        self.graph.replay()


def replayed(step: peers.Step) -> peers.Step:
    """The step as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return Replay(step, graph)


def run(case: Case, stations: int, args: argparse.Namespace, device: torch.device) -> list[Result]:
    """All that is measured of a length and a number of stations."""
    sources = sorted({min(stations - 1, n) for n in (*args.gather, stations - 1)})
    exchanges = ["messages", *(f"gather:{number}" for number in sources)]
    launched: dict[str, Callable[[peers.Step], peers.Step]] = {"eager": lambda step: step}
    launched |= {"graph": replayed} if args.graphs else {}
    steps: dict[str, peers.Step] = {}

    def add(name: str, both: tuple[peers.Step, peers.Step]) -> None:
        steps.update({f"{name}, {way}": step for way, step in zip(WAYS, both, strict=True)})

    for kernel in args.kernels:
        add(f"whole, {kernel}", kernels.ours(kernel, case, HEAD_DIM, device))
        for exchange, (how, made), rank in product(exchanges, launched.items(), (0, stations - 1)):
            axis = Axis(rank, stations)
            forward, backward = one_rank(case, kernel, exchange, axis, device)
            add(f"{kernel}, {exchange}, {how}, {rank}", (made(forward), made(backward)))
    found = milliseconds(steps, device, args.repeats)
    times = {name: median(map(max, turns)) for name, turns in found.items()}

    def taken(name: str) -> dict[str, float]:
        ms = {way: times[f"{name}, {way}"] for way in WAYS}
        return ms | {"both": sum(ms.values())}

    wholes = [taken(f"whole, {kernel}") for kernel in args.kernels]
    ideal = {way: min(whole[way] for whole in wholes) / stations for way in (*WAYS, "both")}
    rows = []
    for kernel, exchange, how in product(args.kernels, exchanges, launched):
        ends = [taken(f"{kernel}, {exchange}, {how}, {rank}") for rank in (0, stations - 1)]
        ms = {way: max(end[way] for end in ends) for way in ideal}
        rows.append(
            {
                "seq_len": case.seq_len,
                "stations": stations,
                "kernel": kernel,
                "exchange": exchange,
                "launched": how,
                "ms": ms,
                "ideal_ms": ideal,
                "share_of_ideal": {way: ideal[way] / ms[way] for way in ideal},
            }
        )
    return rows


def line(row: Result) -> str:
    parts = (f"{row['ms'][way]:8.3f} {row['share_of_ideal'][way]:6.3f}" for way in row["ms"])
    what = f"{row['kernel']}, {row['exchange']}, {row['launched']}"
    return f"{row['seq_len']:8} / {row['stations']}  {what:32} {'  '.join(parts)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq-lens", type=int, nargs="+", default=[16384, 32768])
    parser.add_argument("--stations", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--gather", type=int, nargs="+", default=[1, 2, 4], help="and all")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=["flash4", "triton"])
    parser.add_argument("--graphs", action="store_true", help="time replays of CUDA graphs too")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if 2 * args.kv_heads > args.heads:
        parser.error("with so many key heads a ring's queries travel, which is not played here")
    device = peers.start()
    rows: list[Result] = []
    print(f"{'tokens':>8} / N  {'what':32} " + "  ".join(f"{w:>8} share " for w in (*WAYS, "both")))
    for seq_len, stations in product(args.seq_lens, args.stations):
        case = Case("causal", seq_len, heads=args.heads, kv_heads=args.kv_heads)
        found = run(case, stations, args, device)
        print("\n".join(map(line, found)), flush=True)
        rows += found
        if args.json:
            facts: Result = {"device": peers.device_name(device), "torch": torch.__version__}
            facts |= {"command": " ".join(sys.argv), "rows": rows}
            args.json.write_text(json.dumps(facts, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
