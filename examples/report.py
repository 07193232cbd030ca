"""Losses of several runs side by side: a table, a PNG of the curves, and whether they agree.

    python examples/report.py runs/curves.png "one process=runs/one.json" "ring 4=runs/ring.json"

Exits with 1 if a loss of the first 20 steps differs by more than 1e-5 from the first run's.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

STEPS, TOLERANCE = 20, 1e-5
Runs = dict[str, list[dict[str, float]]]


def largest_difference(runs: Runs) -> float:
    """Over the first `STEPS` steps, from the first run, in nats a token."""
    columns = [[entry["loss"] for entry in run[:STEPS]] for run in runs.values()]
    if len({len(column) for column in columns}) > 1:
        raise ValueError(
            f"the runs have {[len(run) for run in runs.values()]} steps; need the same"
        )
    return max(abs(a - b) for column in columns for a, b in zip(columns[0], column, strict=True))


def table(runs: Runs) -> Table:
    drawn = Table("step", *runs, title="loss, nats a token")
    steps = len(next(iter(runs.values())))
    for step in [step for step in range(steps) if step < STEPS or (step + 1) % 10 == 0]:
        drawn.add_row(str(step + 1), *(f"{run[step]['loss']:.6f}" for run in runs.values()))
    validation = (f"{run[-1].get('validation_loss', float('nan')):.6f}" for run in runs.values())
    drawn.add_row("validation", *validation, style="bold")
    return drawn


def draw(runs: Runs, path: Path) -> None:
    """The curves on top of each other, and below them how far each is from the first."""
    figure, (above, below) = plt.subplots(
        2, sharex=True, figsize=(8, 6), height_ratios=(3, 1), layout="constrained"
    )
    first = next(iter(runs.values()))
    for place, (name, run) in enumerate(runs.items()):
        steps = [entry["step"] for entry in run]
        # Wide lines under narrow ones, since the curves cover each other.
        width = 2 * (len(runs) - place)
        above.plot(steps, [entry["loss"] for entry in run], label=name, linewidth=width)
        apart = [max(abs(a["loss"] - b["loss"]), 1e-9) for a, b in zip(first, run, strict=True)]
        below.semilogy(steps, apart, linewidth=1.5)
    below.axhline(TOLERANCE, color="gray", linestyle=":")
    above.set(title="One GPT, four ways to spread it over ranks", ylabel="loss, nats a token")
    below.set(xlabel="step", ylabel="difference from\nthe first run", ylim=(5e-10, 1e-3))
    above.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    path, named = Path(sys.argv[1]), (argument.split("=", 1) for argument in sys.argv[2:])
    runs: Runs = {name: json.loads(Path(file).read_text()) for name, file in named}
    Console().print(table(runs))
    draw(runs, path)
    apart = largest_difference(runs)
    print(f"largest difference over {STEPS} steps: {apart:.1e}; curves in {path}")
    if apart > TOLERANCE:
        sys.exit(f"the runs disagree: {apart:.1e} is more than {TOLERANCE:.0e}")


if __name__ == "__main__":
    main()
