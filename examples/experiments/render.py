"""What the experiments' JSON says, as Markdown and pictures.

    python examples/experiments/render.py mfu.json mfu_1m.json max_context.json   # prints
    python examples/experiments/render.py mfu.json mfu_1m.json max_context.json \\
        --folder examples/experiments/results                                     # writes

`--folder` gets RESULTS.md, a picture for each report with its name, and memory.png: what the
planner expects of each part for one ring of all GPUs by context, and what mfu.py measured for the
same model, ring and form over it.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mfu import expected_kind, facts, form
from tables import (
    context_lines,
    draw_contexts,
    draw_memory,
    draw_mfu,
    error_line,
    machine_line,
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
Report = dict[str, Any]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    add = parser.add_argument
    add("reports", type=Path, nargs="+", help="JSON files of max_context.py and mfu.py")
    add("--folder", type=Path, help="for RESULTS.md and pictures")
    add("--again", action="store_true", help="expect what the planner does now, not at the run")
    add("--model", default="llama-1b", help="of memory.png, as the next four")
    add("--gpus", type=int, default=2)
    add("--hardware", default="h200")
    add("--form", default="selective:ff_chunk=8192")
    add("--longest", type=tokens, default=tokens("1M"))
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    reports = {path.stem: json.loads(path.read_text()) for path in args.reports}
    if len(reports) < len(args.reports):
        raise SystemExit("reports go by their files' names: give each another name")
    contexts = {name: each for name, each in reports.items() if "methods" in each["rows"][0]}
    trained = {name: each for name, each in reports.items() if name not in contexts}
    if args.again:
        for each in trained.values():
            each["rows"] = [again(row, each["hardware"]) for row in each["rows"]]
    text = "\n".join(lines(contexts, trained, pictures=args.folder is not None))
    if args.folder is None:
        print(text)
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    (args.folder / "RESULTS.md").write_text(text + "\n")
    for name, each in contexts.items():
        draw_contexts(each, args.folder / f"{name}.png")
    ran = {name: each for name, each in trained.items() if any_ran(each)}
    for name, each in ran.items():
        draw_mfu(each, args.folder / f"{name}.png")
    if ran:
        memory(args, rows_of(trained))


def again(row: dict[str, Any], machine: dict[str, Any]) -> dict[str, Any]:
    """A row with what the planner expects now."""
    if "skipped" in row:
        return row
    rates = {name: tuple(map(_tuple, machine[name])) for name in ("measured", "head_dim_rates")}
    job = Job(
        model_shape.ModelShape(**row["model"]),
        hardware.Hardware(**machine | rates),
        *(row[name] for name in ("gpus", "seq_len", "batch")),
    )
    found = estimate(job, Choice(**row["choice"]))
    expected = facts(found)["expected"]
    kinds = {
        name: both | {"expected": expected_kind(name, expected)}
        for name, both in row["kinds"].items()
    }
    return row | {
        "expected": expected,
        "kinds": kinds,
        "errors": {key: expected[key] / row[key] - 1 for key in ("seconds", "peak_bytes")},
    }


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def any_ran(report: Report) -> bool:
    return any("skipped" not in row for row in report["rows"])


def rows_of(trained: dict[str, Report]) -> list[dict[str, Any]]:
    return [row for each in trained.values() for row in each["rows"]]


def lines(contexts: dict[str, Report], trained: dict[str, Report], pictures: bool) -> Iterator[str]:
    """All reports as Markdown, those of mfu.py in one table."""
    yield "# Results"
    for name, each in contexts.items():
        yield from ("", f"## {name}", "", machine_line(each), "", *context_lines(each))
        if pictures:
            yield from ("", f"![longest sequences]({name}.png)")
    if not trained:
        return
    rows = rows_of(trained)
    yield from ("", "## MFU, time and memory", "")
    yield from (machine_line(each) for each in trained.values())
    yield from ("", *mfu_lines(rows))
    ran = [name for name, each in trained.items() if any_ran(each)]
    if ran:
        yield from ("", error_line(rows))
    if pictures and ran:
        yield from ("", *(f"![MFU]({name}.png)" for name in ran))
        yield from ("", "![memory by context](memory.png)")
    for row in rows:
        if "skipped" not in row:
            yield from ("", f"### {title(row)}", "", *part_lines(row))


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
    draw_memory(found, same, args.folder / "memory.png")


if __name__ == "__main__":
    main()
