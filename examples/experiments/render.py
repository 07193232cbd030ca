"""The experiments' JSON as Markdown and pictures, and the memory of a model by context.

    python examples/experiments/render.py max_context.json mfu.json            # prints the tables
    python examples/experiments/render.py mfu.json max_context.json --folder pictures
    python examples/experiments/render.py mfu.json --memory memory.png --model llama-1b --gpus 2 \\
        --form selective:ff_chunk=8192

`--folder` gets max_context.png and mfu.png. `--memory` draws what the planner expects of each part
for one ring of all GPUs, with what mfu.py measured for the same model, ring and form over it.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mfu import form
from tables import (
    context_lines,
    draw_contexts,
    draw_memory,
    draw_mfu,
    mfu_lines,
    part_lines,
    title,
)

from ring_sp import hardware, model_shape
from ring_sp.cli import tokens
from ring_sp.estimate import estimate
from ring_sp.job import Choice, Job

POINTS = 12
"""Lengths in the picture of memory, each sqrt(2) times the one before."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    add = parser.add_argument
    add("reports", type=Path, nargs="+", help="JSON files of max_context.py and mfu.py")
    add("--folder", type=Path, help="for pictures")
    add("--memory", type=Path, metavar="PNG", help="draw memory by context")
    add("--model", default="llama-1b")
    add("--gpus", type=int, default=2)
    add("--hardware", default="h200")
    add("--form", default="selective:ff_chunk=8192")
    add("--longest", type=tokens, default=tokens("1M"))
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    reports = [json.loads(path.read_text()) for path in args.reports]
    contexts = [each for each in reports if "methods" in each["rows"][0]]
    trained = [each for each in reports if "methods" not in each["rows"][0]]
    for each in contexts:
        print("\n".join([*context_lines(each), ""]))
        if args.folder:
            draw_contexts(each, args.folder / "max_context.png")
    for each in trained:
        print("\n".join([*mfu_lines(each["rows"]), ""]))
        for row in each["rows"]:
            if "skipped" not in row:
                print("\n".join([title(row), "", *part_lines(row), ""]))
        if args.folder:
            draw_mfu(each, args.folder / "mfu.png")
    if args.memory:
        memory(args, [row for each in trained for row in each["rows"]])


def memory(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """The picture of memory by context, with the rows that were of the same over it."""
    machine, shape = hardware.find(args.hardware), model_shape.find(args.model)
    choice = Choice(**{"ring": args.gpus} | form(args.form))
    lengths = [round(args.longest / 2 ** (place / 2)) for place in reversed(range(POINTS))]
    found = [estimate(Job(shape, machine, args.gpus, length), choice) for length in lengths]
    same = [
        (row["seq_len"], row["peak_bytes"])
        for row in rows
        if "skipped" not in row
        and row["model"] == asdict(shape)
        and row["choice"] == asdict(choice)
    ]
    draw_memory(found, same, args.memory)


if __name__ == "__main__":
    main()
