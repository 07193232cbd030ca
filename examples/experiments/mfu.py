"""Train models a few steps each, and lay MFU, time and memory beside what the planner expects
(arXiv:2310.01889, section 5.2 and table 4).

    torchrun --nproc_per_node 2 examples/experiments/mfu.py --models llama-1b llama-8b:layers=4 \\
        --rings 1 2 --per-gpu 32k --forms none selective:ff_chunk=4096 --json mfu.json --png mfu.png
    torchrun --nproc_per_node 2 examples/experiments/mfu.py --rings 2 --tokens 1M --steps 1 \\
        --warm-up 16k --forms selective:ff_chunk=8192
    torchrun --nproc_per_node 2 examples/experiments/mfu.py \\
        --cases "llama-1b 2 64k selective" "qwen3-0.6b 1 32k full:every=2"

All in one process group. Each ring trains a sequence of its own, so that all GPUs work whatever its
size. MFU counts no FLOPs twice and of causal attention only the pairs that see each other. On CPUs
everything runs too, and bytes are counted by `counted.py`; the share of a peak says nothing there.
"""

import argparse
import gc
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from counted import Counted
from device_time import by_kind
from processes import everywhere, first, machine, ranks, say, started
from progress import progress
from step import Form, Measured, Training
from tables import draw_mfu, mfu_lines, part_lines, title

from ring_sp import ProcessGroupManager, Topology, hardware, model_shape
from ring_sp.cli import tokens
from ring_sp.estimate import Estimate, estimate
from ring_sp.job import Choice, Job
from ring_sp.search import check_fixed
from ring_sp.step_time import FITTED_TO, recomputed

LOSS_CHUNK = 2048
TRAINED = {"ff_chunk", "loss_chunk", "every", "offload"}
"""What of a `Choice` a form may say; what it divides among GPUs is a ring and data."""
Row = dict[str, Any]


def form(text: str) -> dict[str, Any]:
    """Fields of `Choice` from such as "selective:ff_chunk=4096,every=2,offload=true"."""
    checkpoint, options = model_shape.options(text)
    if unknown := options.keys() - TRAINED:
        raise ValueError(f"a form may have {sorted(TRAINED)}; got {sorted(unknown)} in {text!r}")
    fixed = {"checkpoint": checkpoint, "loss_chunk": LOSS_CHUNK} | options
    if fixed["loss_chunk"] == 0:
        fixed["loss_chunk"] = None
    check_fixed(fixed)
    return fixed


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    add = parser.add_argument
    add("--models", nargs="+", default=["llama-1b"], help="names, such as llama-8b:layers=4")
    add("--rings", nargs="+", type=number, help="GPUs of a sequence; by default one, and all")
    lengths = parser.add_mutually_exclusive_group()
    lengths.add_argument("--tokens", nargs="+", type=tokens, help="of a sequence")
    lengths.add_argument(
        "--per-gpu",
        nargs="+",
        type=tokens,
        default=[tokens("16k")],
        help="tokens of each GPU: a ring's sequence is as many times longer",
    )
    add("--forms", nargs="+", default=["none"], help="such as selective:ff_chunk=4096,every=2")
    add("--cases", nargs="+", help="these alone, each 'model ring tokens-of-a-GPU form'")
    add("--steps", type=number, default=3, help="timed, after one that warms up")
    add("--warm-up", type=tokens, help="tokens of the step that warms up, if not as the others")
    add("--hardware", default="h200", help="a name, or a .json file of ring-sp bench")
    add("--profile", action="store_true", help="one more step each: device time by kind of kernel")
    add("--force", action="store_true", help="try what does not fit by the planner")
    add("--json", type=Path)
    add("--png", type=Path)
    return parser.parse_args()


def jobs(args: argparse.Namespace) -> Iterator[tuple[Job, Choice]]:
    """Every configuration that was asked for; shapes and choices that make no sense raise."""
    machine, world = hardware.find(args.hardware), ranks()
    rings = args.rings or sorted({1, world})
    asked = list(product(args.models, rings, args.tokens or args.per_gpu, args.forms))
    if args.cases:
        asked = [case(text) for text in args.cases]
    for model, ring, length, text in asked:
        seq_len = length if args.tokens else length * ring
        data = max(1, world // ring)
        yield (
            Job(model_shape.find(model), machine, world, seq_len, batch=data),
            Choice(**{"ring": ring, "data": data} | form(text)),
        )


def number(text: str) -> int:
    found = int(text)
    if found < 1:
        raise argparse.ArgumentTypeError(f"it must be at least 1; got {found}")
    return found


def case(text: str) -> tuple[str, int, int, str]:
    """Model, ring, tokens of a GPU and form."""
    try:
        model, ring, length, kept = text.split()
        return model, number(ring), tokens(length), kept
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"a case is 'model ring tokens form'; got {text!r}: {error}") from None


def measure(
    found: Estimate, topology: Topology, device: torch.device, args: argparse.Namespace
) -> Row:
    """Train a configuration; every rank returns the row."""
    with ExitStack() as modes:
        counted = None
        if device.type == "cpu":
            counted = modes.enter_context(Counted())
        gc.collect()
        training = Training(Form(found.job.model, found.choice), topology, device, counted)
        training.run(args.warm_up or found.job.seq_len)
        steps = []
        with progress(training.model.blocks, device, shown=args.steps == 1):
            for number in range(args.steps):
                everywhere(None)
                steps.append(training.run(found.job.seq_len, number + 1))
        kinds = {}
        if args.profile and device.type == "cuda":
            kinds = by_kind(lambda: training.run(found.job.seq_len))
    return row(found, everywhere(steps), everywhere(kinds)[0])


def row(found: Estimate, steps: list[list[Measured]], kinds: dict[str, float]) -> Row:
    """What the steps of all ranks took, beside what the planner expects: the slowest rank, the
    median step.
    """
    slowest = [
        max(each, key=lambda step: sum(step.seconds.values())) for each in zip(*steps, strict=True)
    ]
    seconds = median(sum(step.seconds.values()) for step in slowest)
    peak = max(step.peak_bytes for own in steps for step in own)
    job, planned = found.job, facts(found)
    return {
        **planned,
        "steps": len(slowest),
        "seconds": seconds,
        "parts": {
            name: median(step.seconds[name] for step in slowest) for name in slowest[0].seconds
        },
        "tokens_per_second": job.batch * job.seq_len / seconds,
        "mfu": found.flops / seconds / job.gpus / job.hardware.peak_flops,
        "peak_bytes": peak,
        "held_bytes": max(step.held_bytes for own in steps for step in own),
        "loss": slowest[-1].loss,
        "kinds": {
            name: {"measured": spent, "expected": expected_kind(name, planned["expected"])}
            for name, spent in kinds.items()
        },
        "errors": {
            "seconds": found.seconds / seconds - 1,
            "peak_bytes": found.peak_bytes / peak - 1,
        },
    }


def expected_kind(name: str, expected: Row) -> float:
    """Seconds of a kind of kernel by the planner, recomputed ones too."""
    found: float = expected["times"].get(name, 0.0) + expected["recomputed"].get(name, 0.0)
    return found


def facts(found: Estimate) -> Row:
    """A configuration and what the planner expects of it."""
    return {
        "model": asdict(found.job.model),
        "gpus": found.job.gpus,
        "seq_len": found.job.seq_len,
        "batch": found.job.batch,
        "choice": asdict(found.choice),
        "flops": found.flops,
        "expected": {
            "seconds": found.seconds,
            "mfu": found.mfu,
            "peak_bytes": found.peak_bytes,
            "times": found.times,
            "recomputed": recomputed(found.job, found.choice, found.told),
            "memory": found.memory,
        },
        # None of FITTED_TO is a step of this script.
        "fitted": False,
    }


def main() -> None:
    args = parse_args()
    rows: list[Row] = []
    with started() as device:
        topologies: dict[int, Topology] = {}
        for job, choice in jobs(args):
            found = estimate(job, choice)
            if choice.ring not in topologies:
                groups = ProcessGroupManager.build(ring=choice.ring, device_type=device.type)
                topologies[choice.ring] = groups.topology
            if found.fits or args.force:
                rows.append(measure(found, topologies[choice.ring], device, args))
            else:
                reason = f"lacks {found.missing_bytes / 1e9:.1f} GB by the planner"
                rows.append(facts(found) | {"skipped": reason})
            say("\n".join(list(mfu_lines(rows))[0 if len(rows) == 1 else -1 :]))
            # After each, in case that a later one fails.
            if first() and args.json:
                args.json.write_text(json.dumps(report(rows, job, device), indent=1))
        if first():
            finish(rows, report(rows, job, device), args)


def report(rows: list[Row], job: Job, device: torch.device) -> Row:
    return {
        **machine(device),
        "hardware": asdict(job.hardware),
        "fitted_to": FITTED_TO,
        "rows": rows,
    }


def finish(rows: list[Row], facts: Row, args: argparse.Namespace) -> None:
    """All rows again, where their time goes, and what the planner was fitted to."""
    say("\n".join(["", *mfu_lines(rows)]))
    for each in rows:
        if "skipped" not in each:
            say("\n".join(["", title(each), "", *part_lines(each)]))
    say("\n".join(["", "fitted to other runs than these:", *FITTED_TO]))
    if args.png and any("skipped" not in each for each in rows):
        draw_mfu(facts, args.png)


if __name__ == "__main__":
    main()
