"""Time exact ring attention against the best that the same GPUs can do.

    torchrun --nproc_per_node 2 examples/benchmarks/attention.py --json ring.json --png ring.png

For each case: the ideal (the fastest kernel of one GPU on the whole problem, divided by the GPUs),
our ring with each kernel that serves the case, and torch's own context_parallel, all in this run.
All take turns, on all GPUs at once; times are milliseconds of forward + backward on the slowest of
them, medians over the turns, as are the shares of the ideal; the JSON has the medians of each GPU
too. Memory is the peak of a rank. Batch 1, bf16, head dim 128.
On CPUs (gloo) use --cases tiny to try the script.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import product
from pathlib import Path
from random import Random
from statistics import median
from time import sleep
from typing import Any

import peers
import torch
import torch.distributed as dist
from picture import draw

import ring_sp
from ring_sp import masks
from ring_sp.exchanges import EXCHANGES
from ring_sp.kernels import KERNELS

HEAD_DIM = 128
Result = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One attention problem: its whole length in tokens, its mask, and who shares key heads."""

    name: str
    seq_len: int
    mask: masks.Mask = field(default_factory=masks.causal)
    heads: int = 32
    kv_heads: int = 8
    layout: str = "zigzag"

    @property
    def flops(self) -> int:
        """Of forward and backward: 4 and 10 a head, head dim and visible pair."""
        shard = (range(self.seq_len),)
        pairs = sum(tile.area for tile in masks.tiles(self.mask, shard, shard))
        return 14 * self.heads * HEAD_DIM * pairs

    def bytes_by_hand(self, ranks: int) -> int:
        """What a rank must hold in forward + backward: q, out, dout and dq; k and v, their
        gradients and two buffers on their way; lse; and dq, dk and dv in float32.
        """
        queries, keys = self.heads * HEAD_DIM, 2 * self.kv_heads * HEAD_DIM
        per_token = 2 * (4 * queries + 4 * keys) + 4 * self.heads + 4 * (queries + keys)
        return self.seq_len // ranks * per_token


def packed(seq_len: int, mean_len: int, seed: int = 0) -> masks.Mask:
    """Documents of log-normal lengths with a median of `mean_len` tokens."""
    random, cuts = Random(seed), [0]
    while cuts[-1] < seq_len:
        length = int(random.lognormvariate(0.0, 1.0) * mean_len)
        cuts.append(min(cuts[-1] + max(length, 1), seq_len))
    return masks.documents(cuts)


SHORT = ("causal 2k", "causal 4k", "tiny")
"""Cases that a GPU ends before a CPU has launched them; measured where they are asked for."""


def cases() -> dict[str, Case]:
    k = 1024
    listed = [
        *(Case(f"causal {n}k", n * k) for n in (2, 4, 16, 32, 64, 128)),
        Case("documents 64k", 64 * k, packed(64 * k, 4 * k), layout="balanced"),
        Case("window 4k of 128k", 128 * k, masks.sliding_window(4 * k - 1), layout="contiguous"),
        Case("causal 32k MHA", 32 * k, kv_heads=32),
        *(Case(f"causal {n}k, 16 heads", n * k, heads=16, kv_heads=4) for n in (32, 64)),
        Case("full 32k", 32 * k, masks.full()),
        Case("tiny", 256, heads=4, kv_heads=2),
    ]
    return {case.name: case for case in listed}


def milliseconds(
    steps: dict[str, peers.Step], device: torch.device, repeats: int, rest: float = 0.0
) -> dict[str, list[list[float]]]:
    """Times of each step, of every rank in every turn. They take turns, so that a GPU that grows
    warm and slow is slow for all. A `rest`, in seconds, before each time, and times so short, leave
    a GPU its highest clock.
    """
    inner, at_once = {}, 50 if rest else 250
    for name, step in steps.items():
        for _ in range(3):
            step()
        # So many that starting them is no part of the time.
        inner[name] = max(1, min(40, int(at_once / max(_elapsed(step, device, 1)))))
    found: dict[str, list[list[float]]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            sleep(rest)
            found[name].append(_elapsed(step, device, inner[name]))
    return found


def _elapsed(step: peers.Step, device: torch.device, inner: int) -> list[float]:
    events = [peers.event(device) for _ in range(2)]
    peers.synchronize(device)
    dist.barrier()
    step()  # Under it the host gets ahead.
    events[0].record()
    for _ in range(inner):
        step()
    events[1].record()
    peers.synchronize(device)
    time = torch.tensor([events[0].elapsed_time(events[1]) / inner], device=device)
    times = time.new_empty(dist.get_world_size())
    dist.all_gather_into_tensor(times, time)
    return [float(each) for each in times.tolist()]


@cache
def topology(exchange: str, sums: str | None) -> ring_sp.Topology:
    build = ring_sp.ProcessGroupManager.build
    dtype = None if sums is None else getattr(torch, sums)
    return build(ring=dist.get_world_size(), exchange=exchange, sums_dtype=dtype).topology


def ours(
    case: Case, kernel: str, exchange: str, sums: str | None, device: torch.device
) -> peers.Step:
    """Forward and backward of one rank's part."""
    place = topology(exchange, sums)
    sequence = ring_sp.ShardedSequence(case.seq_len, place, case.mask, case.layout)
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    q, k, v, dout = peers.drawn(heads, sequence.local_len, HEAD_DIM, device)
    trained = [x.requires_grad_() for x in (q, k, v)]

    def step() -> object:
        out = ring_sp.ring_attention(q, k, v, sequence, kernel=kernel)
        return torch.autograd.grad(out, trained, dout)

    return step


def tried(make: Callable[[], peers.Step], device: torch.device) -> Result:
    """Peak bytes of a step alone on its GPU, of the rank that has most; the reason where it cannot
    run on some rank.
    """
    reason, step = "", None
    try:
        step = make()
        step()
    except (ValueError, ImportError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    reasons: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(reasons, reason)
    if step is None or any(reasons):
        return {"refused": next(filter(None, reasons))}
    peaks = [0] * dist.get_world_size()
    dist.all_gather_object(peaks, peers.peak_bytes(step, device))
    return {"peak_bytes": max(peaks)}


def run(case: Case, args: argparse.Namespace, device: torch.device) -> Result:
    """All that is measured of a case."""
    size = dist.get_world_size()
    contenders: dict[str, Callable[[], peers.Step]] = {
        f"one GPU, {name}": partial(make, case, HEAD_DIM, device)
        for name, make in peers.SINGLE.items()
    }
    contenders |= {
        f"ring, {kernel}, {exchange}": partial(
            ours, case, kernel, exchange, args.sums_dtype, device
        )
        for kernel in args.kernels
        for exchange in args.exchanges
    }
    if case.mask in (masks.causal(), masks.full()):
        contenders["torch context_parallel"] = partial(
            peers.context_parallel, case, HEAD_DIM, device
        )
    found = {name: tried(make, device) for name, make in contenders.items()}
    steps = {name: contenders[name]() for name, x in found.items() if "refused" not in x}
    of_ranks = milliseconds(steps, device, args.repeats, args.rest)
    times = {name: [max(each) for each in turns] for name, turns in of_ranks.items()}
    singles = {name: median(each) for name, each in times.items() if name.startswith("one GPU")}
    fastest = min(singles, key=lambda name: singles[name], default=None)
    ideal = singles[fastest] if fastest else None
    for name, each in times.items():
        ranks, result = 1 if name.startswith("one GPU") else size, found[name]
        result["ms"] = median(each)
        result["ms_of_ranks"] = [median(turns) for turns in zip(*of_ranks[name], strict=True)]
        if fastest:
            shares = (best / own / ranks for best, own in zip(times[fastest], each, strict=True))
            result["share_of_ideal"] = median(shares)
        result["tflops"] = case.flops / result["ms"] / 1e9 / ranks
        result["of_bytes_by_hand"] = result["peak_bytes"] / case.bytes_by_hand(ranks)
    return {"case": case.name, "ideal_ms": ideal and ideal / size, "results": found}


def table(rows: list[Result]) -> str:
    columns = ("ms", 9), ("TFLOP/s", 8), ("of ideal", 8), ("peak GB", 8), ("by hand", 8)
    lines = [f"{'case':20} {'what':26} " + " ".join(f"{name:>{width}}" for name, width in columns)]
    for row in rows:
        for name, x in row["results"].items():
            if "refused" in x:
                lines.append(f"{row['case']:20} {name:26} {x['refused'][:90]}")
                continue
            share = f"{x['share_of_ideal']:8.3f}" if "share_of_ideal" in x else " " * 8
            lines.append(
                f"{row['case']:20} {name:26} {x['ms']:9.3f} {x['tflops']:8.0f} {share} "
                f"{x['peak_bytes'] / 1e9:8.3f} {x['of_bytes_by_hand']:8.3f}"
            )
    return "\n".join(lines)


def report(rows: list[Result], args: argparse.Namespace, device: torch.device) -> None:
    """Write what was found so far."""
    facts = {"device": peers.device_name(device), "ranks": dist.get_world_size()}
    facts |= {"torch": torch.__version__, "command": " ".join(sys.argv), "rows": rows}
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1))
    if args.png:
        draw(facts, args.png)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = [name for name in cases() if name not in SHORT]
    parser.add_argument("--cases", nargs="+", choices=cases(), default=every)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=["flash4", "triton"])
    parser.add_argument("--exchanges", nargs="+", choices=EXCHANGES, default=EXCHANGES.names)
    parser.add_argument(
        "--sums-dtype", choices=("float32", "bfloat16"), help="in which gradients travel"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rest", type=float, default=0.0, help="seconds before each time")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    parser.add_argument("--trace", type=Path, help="folder for a profiler timeline of each ring")
    args = parser.parse_args()
    device = peers.start()
    rows = []
    for name in args.cases:
        rows.append(run(cases()[name], args, device))
        if dist.get_rank() == 0:
            print(table(rows[-1:]), flush=True)
            report(rows, args, device)
        if args.trace:
            for kernel, exchange in product(args.kernels, args.exchanges):
                if "refused" in rows[-1]["results"][f"ring, {kernel}, {exchange}"]:
                    continue
                step = ours(cases()[name], kernel, exchange, args.sums_dtype, device)
                peers.trace(step, args.trace, f"{name} {kernel} {exchange}", device)
                del step  # It would count in the peaks of the next case.
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
