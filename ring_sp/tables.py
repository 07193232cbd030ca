"""Tables of a plan and of the paper, for a terminal. Needs rich where they are made."""

from collections.abc import Iterable, Iterator
from dataclasses import fields
from itertools import groupby
from typing import TYPE_CHECKING

from ring_sp.arithmetic import arithmetic, scaled
from ring_sp.estimate import Estimate
from ring_sp.job import Choice
from ring_sp.paper import Cell
from ring_sp.planner import Plan
from ring_sp.step_memory import WORK_PARTS

if TYPE_CHECKING:
    from rich.table import Table


def plan_tables(plan: Plan) -> Iterator["Table"]:
    """What a plan costs, what was chosen and why, and the arithmetic."""
    best = plan.best
    yield _memory(best)
    yield _times(best)
    chosen = [
        (field.name, _shown(getattr(best.choice, field.name)), plan.reasons.get(field.name, ""))
        for field in fields(Choice)
        if field.name != "loss_chunk"
    ]
    yield _table("choice", ("", "", "beside it, at best (2% are as good)"), chosen)
    sources = best.job.hardware.sources
    rates = [
        (name.replace("_", " "), _rate(name, getattr(best.job.hardware, name)), source)
        for name, source in sources.items()
    ]
    yield _table(f"rates of {best.job.hardware.name}", ("", "", "from"), rates)
    yield _table("arithmetic", ("", ""), list(arithmetic(best)))


def paper_tables(cells: Iterable[Cell]) -> Iterator["Table"]:
    """A table for each of the paper's: a row for each of its rows, `computed (printed)` where they
    differ.
    """
    titles = {
        "1": "table 1: peak bytes of activations of a layer",
        "2": "table 2: least block and sequence that hide transfers",
        "C": "appendix C: transfers in decoding",
        "D": "appendix D: cost of a data set at k times 4K tokens",
    }
    for name, of_table in groupby(cells, lambda cell: cell.table):
        held = list(of_table)
        columns = list(dict.fromkeys(cell.column for cell in held))
        rows = [
            (row, *(_cell(cell) for cell in group))
            for row, group in groupby(held, lambda cell: cell.row)
        ]
        table = _table(titles[name], ("", *columns), rows)
        slips = dict.fromkeys(f"{_where(cell)}: {cell.slip}" for cell in held if cell.slip)
        table.caption = "\n".join(slips) or None
        yield table


def _where(cell: Cell) -> str:
    return cell.column if cell.table == "D" else f"{cell.row}, {cell.column}"


def _cell(cell: Cell) -> str:
    return cell.computed if cell.agrees else f"{cell.computed} (paper: {cell.printed})"


def _memory(best: Estimate) -> "Table":
    rows = [
        (name, f"{num_bytes / 1e9:.2f}", "not at once with the others" * (name in WORK_PARTS))
        for name, num_bytes in best.memory.items()
    ]
    rows.append(("peak", f"{best.peak_bytes / 1e9:.2f}", f"{best.usable_bytes / 1e9:.2f} usable"))
    return _table("memory of a GPU", ("", "GB", ""), rows)


def _times(best: Estimate) -> "Table":
    rows = [
        (name, f"{seconds:.4g}", f"{seconds / best.seconds:.1%}")
        for name, seconds in best.times.items()
    ]
    rows.append(("step", f"{best.seconds:.4g}", f"{best.tokens_per_second:,.0f} tokens/s"))
    rows.append(("MFU", f"{best.mfu:.3f}", "no recomputed FLOPs counted"))
    return _table("time of a step", ("", "s", ""), rows)


def _table(title: str, columns: Iterable[str], rows: Iterable[tuple[str, ...]]) -> "Table":
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left", caption_justify="left")
    for row in rows:
        table.add_row(*row)
    return table


def _shown(value: object) -> str:
    return "all at once" if value is None else str(value)


def _rate(name: str, value: float) -> str:
    if name in {"copy_rate", "link_rate", "network_rate", "host_rate"}:
        return scaled(value, "B/s")
    return scaled(value, "FLOP/s")
