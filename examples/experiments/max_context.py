"""The longest sequence that trains, by method (arXiv:2310.01889, section 5.1 and table 3).

    python examples/experiments/max_context.py --gpus 2 --models llama-1b --memory 40GB \\
        --json max_context.json --png max_context.png
    python examples/experiments/max_context.py --gpus 2 --models tiny.json --memory 40MB  # on CPUs

Every number is of whole training steps that finished (`step.py`): the longest that did, and beside
it the shortest that did not. As in the paper all GPUs divide the optimizer's states in every
column; methods of one GPU train a sequence on each, the ring one on all. On GPUs `--memory` caps
torch's allocator; on CPUs the bytes of tensors are counted (`counted.py`), but for what is inside
of an attention operator. A GPU that runs out of memory in the middle of a ring leaves the others
waiting: steps run in jobs of torchrun, which end when a rank fails, and the search goes on in
another. Trials are written down beside the JSON, in JSON lines of its name, as they begin and end,
and kept until it is there; `--resume` goes on with those of a search that was cut off.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from counted import Counted
from processes import everywhere, machine, ranks, say, started
from search_length import Asked, Trial, longest, propose, shortest_failed
from step import Clock, Form, Training
from tables import METHODS, context_lines, draw_contexts
from trial_log import BEGUN, Log, open_log, read

from ring_sp import ProcessGroupManager, model_shape
from ring_sp.cli import tokens
from ring_sp.job import Choice
from ring_sp.model_shape import ModelShape

FIRST = {"vanilla": 1024, "memory-efficient attention": 2048}
"""Tokens of a GPU to begin with, if not 16k."""
CHUNK = 4096
"""Tokens of the feed-forward's and the loss's chunks."""
UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9}
OUT_OF_MEMORY = "out of memory"


def num_bytes(text: str) -> int:
    """Bytes such as 40GB, 300MB or 123456."""
    for unit, size in UNITS.items():
        if text.upper().endswith(unit):
            return int(float(text[: -len(unit)]) * size)
    return int(text)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    add = parser.add_argument
    add("--gpus", type=int, default=max(torch.cuda.device_count(), 1), help="or processes on CPUs")
    add("--models", nargs="+", default=["llama-1b"])
    add("--methods", nargs="+", choices=METHODS, default=METHODS)
    add("--memory", type=num_bytes, help="of each GPU, such as 40GB; by default all of it")
    add("--checkpoint", choices=("full", "selective"), default="full", help="as the paper; or less")
    add("--all-checkpointed", action="store_true", help="layers of the first two methods too")
    add("--chunk", type=int, default=CHUNK, help="tokens of feed-forward and loss at a time")
    add("--first", type=tokens, help="tokens of a GPU to begin with")
    add("--granule", type=int, default=256, help="tokens of a GPU by which lengths differ")
    add("--resolution", type=float, default=0.02, help="how near the longest and the failed are")
    add("--json", type=Path)
    add("--png", type=Path)
    add("--resume", action="store_true", help="after a run of the same settings that was cut off")
    add("--trials-file", type=Path, help=argparse.SUPPRESS)  # Of a job: trials, one a line.
    return parser.parse_args()


def choice_of(method: str, args: argparse.Namespace, world: int) -> Choice:
    """What a method keeps."""
    checkpointed = method in METHODS[2:] or args.all_checkpointed
    ring = world if method == "ring" else 1
    base = Choice(
        data=world // ring, ring=ring, checkpoint=args.checkpoint if checkpointed else "none"
    )
    chunk = args.chunk if method in METHODS[2:] else None
    return replace(base, ff_chunk=chunk, loss_chunk=chunk)


def asked(method: str, args: argparse.Namespace, world: int) -> Asked:
    size = world if method == "ring" else 1
    begin = args.first or FIRST.get(method, 1 << 14)
    limit = args.memory or torch.cuda.mem_get_info()[1]
    return Asked(limit, begin * size, args.granule * size, args.resolution)


def job(args: argparse.Namespace) -> None:
    """The trials of the methods on these ranks, until all are known or a rank fails."""
    with started() as device:
        if device.type == "cuda":
            total = torch.cuda.mem_get_info()[1]
            torch.cuda.set_per_process_memory_fraction(min(1.0, (args.memory or total) / total))
        for method in args.methods:
            search(method, args, device)


def search(method: str, args: argparse.Namespace, device: torch.device) -> None:
    wanted, log = asked(method, args, ranks()), Log(args.trials_file, method)
    log.trials = everywhere(log.trials)[0]  # The first rank writes on while others read.
    size = ranks() if method == "ring" else 1
    topology = ProcessGroupManager.build(ring=size, device_type=device.type).topology
    form = Form(
        model_shape.find(args.models[0]), choice_of(method, args, ranks()), method == "vanilla"
    )
    with ExitStack() as modes:
        counted = None
        if device.type == "cpu":
            counted = modes.enter_context(Counted())
        if propose(log.trials, wanted) is None:
            return
        training = Training(form, topology, device, counted)
        while (length := propose(log.trials, wanted)) is not None:
            log.begin(length)
            trial = attempt(training, length, wanted.limit)
            log.end(trial)
            say(f"{method}: {length:,} tokens {trial.outcome}, {trial.held_bytes / 1e9:.3g} GB")


def attempt(training: Training, length: int, limit: int) -> Trial:
    """A step; every rank returns the same."""
    begin, clock, outcome = perf_counter(), Clock(training.device), "finished"
    training.reset_peak()
    try:
        training.differentiate(length, 0, clock)
    except torch.OutOfMemoryError:
        if training.topology.size > 1:
            raise  # The others wait for this rank: only the end of the job ends that.
        outcome = OUT_OF_MEMORY
    outcomes = everywhere(outcome)
    if OUT_OF_MEMORY in outcomes:
        gc.collect()
        training.forget()
        return Trial(length, False, outcome=OUT_OF_MEMORY)
    training.update(clock)
    held = max(everywhere(training.peaks()[1]))
    seconds = max(everywhere(perf_counter() - begin))
    fits = held <= limit
    return Trial(length, fits, held, "finished" if fits else "finished, over the limit", seconds)


def settings(model: str, args: argparse.Namespace) -> dict[str, Any]:
    """On which trials depend."""
    names = ("gpus", "memory", "checkpoint", "all_checkpointed", "chunk")
    return {"model": asdict(model_shape.find(model))} | {
        name: getattr(args, name) for name in names
    }


def explore(model: str, args: argparse.Namespace, log: Path) -> dict[str, Any]:
    """All methods of a model, in as many jobs as it takes; what was found."""
    alone = [method for method in args.methods if method != "ring"]
    for methods in filter(None, (alone, [name for name in args.methods if name == "ring"])):
        while not known(methods, args, log):
            before = len(read(log))
            done = run_job(model, methods, args, log)
            failed = done.returncode != 0
            if failed and OUT_OF_MEMORY not in done.stderr.lower():
                raise RuntimeError(f"a job failed:\n{done.stderr[-4000:]}")
            if failed:
                for method, trial in read(log, BEGUN):
                    Log(log, method).end(replace(trial, outcome=OUT_OF_MEMORY))
            if failed and len(read(log)) == before:
                raise RuntimeError(f"{model} does not fit at all:\n{done.stderr[-1000:]}")
    return summary(model, args, log)


def known(methods: list[str], args: argparse.Namespace, log: Path) -> bool:
    return all(
        propose(Log(log, method).trials, asked(method, args, args.gpus)) is None
        for method in methods
    )


def run_job(
    model: str, methods: list[str], args: argparse.Namespace, log: Path
) -> subprocess.CompletedProcess[str]:
    """What the ranks say goes on to the terminal."""
    given = ["--models", model, "--methods", *methods, "--trials-file", str(log)]
    for name in ("memory", "checkpoint", "chunk", "first", "granule", "resolution"):
        value = getattr(args, name)
        given += [f"--{name}", str(value)] if value is not None else []
    given += ["--all-checkpointed"] if args.all_checkpointed else []
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(args.gpus), __file__, *given]
    # Without it gaps between blocks take several per cent of the memory, at random.
    allocator = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    return subprocess.run(
        command, env=os.environ | allocator, stderr=subprocess.PIPE, text=True, check=False
    )


def summary(model: str, args: argparse.Namespace, log: Path) -> dict[str, Any]:
    shape: ModelShape = model_shape.find(model)
    methods: dict[str, Any] = {}
    for method in args.methods:
        trials = Log(log, method).trials
        methods[method] = {
            "tokens": longest(trials),
            "failed": shortest_failed(trials),
            "choice": asdict(choice_of(method, args, args.gpus)),
            "trials": [asdict(trial) for trial in trials],
        }
    alone = [found["tokens"] for name, found in methods.items() if name != "ring"]
    multiple = None
    if "ring" in methods and any(alone):
        multiple = methods["ring"]["tokens"] / max(alone)
    return {"model": asdict(shape), "methods": methods, "multiple": multiple}


def main() -> None:
    args = parse_args()
    if args.trials_file:
        job(args)
        return
    if args.memory is None and not torch.cuda.is_available():
        raise SystemExit("--memory is needed on CPUs, such as 40MB")
    name = args.json or Path("max_context.json")
    logs = [name.with_name(f"{name.stem}_{number}.jsonl") for number in range(len(args.models))]
    for model, log in zip(args.models, logs, strict=True):
        open_log(log, settings(model, args), args.resume)
    found = [explore(model, args, log) for model, log in zip(args.models, logs, strict=True)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = {
        **machine(device),
        "gpus": args.gpus,
        "memory_bytes": args.memory or torch.cuda.mem_get_info()[1],
        "rows": found,
    }
    print("\n".join(context_lines(report)), flush=True)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
    for log in logs:
        log.unlink()
    if args.png:
        draw_contexts(report, args.png)


if __name__ == "__main__":
    main()
