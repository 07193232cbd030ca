"""ring-sp plan | bench | doctor."""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib import util
from pathlib import Path
from typing import Any

from torch.distributed import DistError

from ring_sp import bench, doctor, hardware, model_shape, paper
from ring_sp.arithmetic import arithmetic
from ring_sp.exchanges import EXCHANGES
from ring_sp.group import alone_or_together
from ring_sp.job import CHECKPOINTS, SHARDS, Job
from ring_sp.layout import LAYOUTS
from ring_sp.planner import Plan, plan
from ring_sp.search import SPLIT

UNITS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
MISTAKE, WRONG = 2, 1
"""Exit codes: the user's mistake; a plan that does not fit, or a round trip that is wrong."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code. Prints what it finds, and mistakes to stderr."""
    args = _parser().parse_args(arguments)
    try:
        return int(args.run(args))
    except (ValueError, NotImplementedError, OSError) as error:
        print(f"ring-sp {args.command}: {error}", file=sys.stderr)
        return MISTAKE
    except DistError as error:
        print(
            f"ring-sp {args.command}: the ranks do not reach each other: {error}\nRun it on one "
            f"rank to check the GPU alone, and with NCCL_DEBUG=INFO to see which link fails.",
            file=sys.stderr,
        )
        return WRONG


def tokens(text: str) -> int:
    """A number of tokens such as 4096, 128k or 1M (k is 1024). Raises ArgumentTypeError."""
    number, unit = (text[:-1], text[-1].lower()) if text[-1:].lower() in UNITS else (text, "")
    try:
        count = float(number) * UNITS.get(unit, 1)
    except ValueError:
        count = 0
    if not count >= 1 or count % 1:
        raise argparse.ArgumentTypeError(f"tokens are such as 4096, 128k or 1M; got {text!r}")
    return int(count)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ring-sp", description="Plan, measure and check rings.")
    commands = parser.add_subparsers(dest="command", required=True)
    planned = commands.add_parser(
        "plan", help="memory and time of a training step, and how to spread it over GPUs"
    )
    _plan_arguments(planned)
    measured = commands.add_parser(
        "bench", help="measure this machine, alone or under torchrun; a file that plan reads"
    )
    measured.add_argument("--json", type=Path, metavar="FILE", help="write a hardware file")
    measured.add_argument("--exchange", choices=EXCHANGES, default="messages")
    measured.add_argument("--seq", type=tokens, help="tokens of attention on a rank")
    measured.set_defaults(run=_bench)
    checked = commands.add_parser(
        "doctor", help="what is installed, what is wrong and what to do; alone or under torchrun"
    )
    checked.add_argument("--exchange", choices=EXCHANGES, default="messages")
    checked.set_defaults(run=_doctor)
    return parser


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="llama-8b", help="a name or a .json file")
    parser.add_argument("--gpu", default="h200", help="a name, or a .json file as of bench")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--seq", type=tokens, default=tokens("128k"), help="such as 128k or 1M")
    parser.add_argument("--batch", type=int, default=1, help="sequences in a step")
    for name in SPLIT:
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--layout", choices=LAYOUTS)
    parser.add_argument("--exchange", choices=EXCHANGES)
    parser.add_argument("--checkpoint", choices=CHECKPOINTS)
    for name in ("ff", "loss"):
        parser.add_argument(
            f"--{name}-chunk", type=int, metavar="TOKENS", help="0 for all tokens at once"
        )
    parser.add_argument("--shard", choices=SHARDS, help="all: FSDP")
    parser.add_argument("--paper", action="store_true", help="the paper's tables, from formulas")
    parser.add_argument("--json", action="store_true", help="print JSON; needs torch alone")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw memory and MFU by length")
    parser.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> int:
    if not args.json:
        _need("rich", "tables; --json does without")
    if args.png:
        _need("matplotlib", "--png")
    if args.paper:
        return _paper(args)
    job = Job(
        model_shape.find(args.model), hardware.find(args.gpu), args.gpus, args.seq, args.batch
    )
    names = (*SPLIT, "layout", "exchange", "checkpoint", "shard")
    fixed = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name in ("ff_chunk", "loss_chunk"):
        if getattr(args, name) is not None:
            fixed[name] = getattr(args, name) or None
    found = plan(job, **fixed)
    if args.png:
        from ring_sp.plan_picture import draw

        draw(found.best, args.png)
    if args.json:
        print(json.dumps(as_facts(found), indent=1))
    else:
        _print_plan(found)
    return 0 if found.best.fits else WRONG


def as_facts(found: Plan) -> dict[str, Any]:
    """A plan as JSON has it: bytes, seconds, tokens."""
    best, job = found.best, found.best.job
    return {
        "job": {"gpus": job.gpus, "seq_len": job.seq_len, "batch": job.batch},
        "model": asdict(job.model) | {"weights": job.model.weights},
        "hardware": asdict(job.hardware) | {"sources": job.hardware.sources},
        "choice": asdict(best.choice),
        "fits": best.fits,
        "memory": best.memory | {"peak": best.peak_bytes, "usable": best.usable_bytes},
        "missing_bytes": best.missing_bytes,
        "seconds": best.times | {"step": best.seconds},
        "tokens_per_second": best.tokens_per_second,
        "mfu": best.mfu,
        "balance": best.told.balance,
        "reasons": found.reasons,
        "hiding": found.hiding,
        "advice": found.advice,
        "remedies": found.remedies,
        "arithmetic": dict(arithmetic(best)),
    }


def _print_plan(found: Plan) -> None:
    from ring_sp.tables import plan_tables

    best = found.best
    _print_tables(plan_tables(found))
    sections = {"communication": found.hiding, "ring or not": found.advice}
    if not best.fits:
        missing = best.missing_bytes
        where = "of its host's memory" if best.missing_on_host else "of its own"
        sections["does not fit"] = (
            f"by {missing:,.0f} bytes ({missing / 1e9:.1f} GB) a GPU, {where}; what would:",
            *found.remedies,
        )
    for title, lines in sections.items():
        for number, line in enumerate(lines):
            print(f"{title if not number else '':<14} {line}")


def _paper(args: argparse.Namespace) -> int:
    cells = paper.cells()
    if args.json:
        print(json.dumps([asdict(cell) | {"agrees": cell.agrees} for cell in cells], indent=1))
        return 0
    from ring_sp.tables import paper_tables

    _print_tables(paper_tables(cells))
    same = sum(cell.agrees for cell in cells)
    print(f"{same} of {len(cells)} cells as printed; the others are explained under their tables")
    return 0


def _bench(args: argparse.Namespace) -> int:
    with alone_or_together(args.exchange) as group:
        found = bench.measure(group, args.seq)
        if group.rank == 0:
            print("\n".join(bench.lines(found)))
            if args.json:  # Last: a file that cannot be written loses nothing.
                hardware.write(found.hardware, args.json)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    with alone_or_together(args.exchange) as group:
        findings = doctor.examine(group)
        if group.rank == 0:
            print("\n".join(doctor.lines(findings)))
    return WRONG if any(each.fatal for each in findings) else 0


def _print_tables(tables: Iterable[Any]) -> None:
    from rich.console import Console

    # A pipe has no width of its own: what is written to a file is not cut at 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 140)
    for table in tables:
        console.print(table)


def _need(package: str, what: str) -> None:
    if util.find_spec(package) is None:
        raise ValueError(f"{package} is needed for {what}: pip install 'ring_sp[cli]'")
