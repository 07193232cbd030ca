"""The experiments' results as Markdown tables and pictures."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ring_sp.estimate import Estimate
from ring_sp.step_memory import STATE_PARTS

Report = dict[str, Any]
METHODS = ("vanilla", "memory-efficient attention", "+ blockwise feed-forward", "ring")
ERRORS = {"seconds": "time", "peak_bytes": "memory"}


def context_lines(report: Report) -> Iterator[str]:
    """Table 3's form: models by methods, in tokens; how far the ring goes beyond one GPU."""
    methods = list(report["rows"][0]["methods"])
    memory = report["memory_bytes"] / 1e9
    yield f"longest sequence, tokens: {report['gpus']} x {report['device']}, {memory:.4g} GB each"
    yield ""
    yield from _header(["model", *methods, "ring over the best of one GPU"])
    for row in report["rows"]:
        cells = [_context(row["methods"][method]) for method in methods]
        times = f"{row['multiple']:.2f}x" if row["multiple"] else ""
        yield _line([row["model"]["name"], *cells, times])


def _context(found: dict[str, Any]) -> str:
    failed = f" ({found['failed']:,} failed)" if found["failed"] else ""
    return f"{found['tokens']:,}{failed}"


def mfu_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Each configuration: time, MFU and memory, expected by the planner and measured."""
    yield from _header(
        [
            *("model", "GPUs", "ring", "tokens of a sequence", "what is kept", "tokens/s"),
            *("MFU expected", "MFU measured", "s expected", "s measured", "off"),
            *("peak GB expected", "peak GB measured", "off"),
        ]
    )
    for row in rows:
        expected, choice = row["expected"], row["choice"]
        name = [row["model"]["name"], str(row["gpus"]), str(choice["ring"]), f"{row['seq_len']:,}"]
        if "skipped" in row:
            yield _line([*name, kept(choice), row["skipped"], *[""] * 8])
            continue
        errors = [f"{row['errors'][key]:+.1%}" for key in ("seconds", "peak_bytes")]
        numbers = [
            f"{row['tokens_per_second']:,.0f}",
            f"{expected['mfu']:.3f}",
            f"{row['mfu']:.3f}",
        ]
        seconds = [f"{expected['seconds']:.4g}", f"{row['seconds']:.4g}", errors[0]]
        peaks = [f"{each / 1e9:.4g}" for each in (expected["peak_bytes"], row["peak_bytes"])]
        yield _line([*name, kept(choice), *numbers, *seconds, *peaks, errors[1]])


def machine_line(report: Report) -> str:
    """What a run was made with."""
    made = ("python", "torch", "triton", "flash-attn-4")
    versions = ", ".join(f"{name} {report[name]}" for name in made)
    return f"{report['device']}, {versions}: `{report['command']}`"


def error_line(rows: list[dict[str, Any]]) -> str:
    """How far off the planner is at most."""
    ran = [row["errors"] for row in rows if "skipped" not in row]
    worst = {key: max((abs(each[key]) for each in ran), default=0) for key in ERRORS}
    parts = [f"{name} by {worst[key]:.1%}" for key, name in ERRORS.items()]
    return f"Of {len(ran)} configurations the planner is off at most: {', '.join(parts)}."


def title(row: dict[str, Any]) -> str:
    """Of one configuration."""
    ring = row["choice"]["ring"]
    where = "one GPU" if ring == 1 else f"ring of {ring}"
    return f"{row['model']['name']}, {short(row['seq_len'])}, {where}: {kept(row['choice'])}"


def kept(choice: dict[str, Any]) -> str:
    """What layers keep, in words."""
    words = {"none": "all", "selective": "inputs, attention's results", "full": "inputs"}
    parts = [words[choice["checkpoint"]]]
    parts += [f"every {choice['every']} layers"] if choice["every"] > 1 else []
    parts += ["on the host"] if choice["offload"] else []
    parts += [f"feed-forward by {choice['ff_chunk']:,}"] if choice["ff_chunk"] else []
    parts += [] if choice["loss_chunk"] else ["whole logits"]
    return ", ".join(parts)


def part_lines(row: dict[str, Any]) -> Iterator[str]:
    """Where the time of one configuration goes: as measured, and what the planner expects."""
    yield from _header(["seconds", "expected", "measured"])
    expected = row["expected"]["times"]
    for name, seconds in expected.items():
        yield _line([name, f"{seconds:.4g}", ""])
    for name, seconds in row["parts"].items():
        yield _line([f"of the device: {name}", "", f"{seconds:.4g}"])
    for name, both in row["kinds"].items():
        shown = f"{both['expected']:.4g}" if both["expected"] else ""
        yield _line([f"kernels: {name}, recomputed ones too", shown, f"{both['measured']:.4g}"])


def draw_contexts(report: Report, path: Path) -> None:
    """Bars of the longest sequence, a group for each model."""
    plt = _pyplot()
    rows = report["rows"]
    methods = list(rows[0]["methods"])
    figure, axes = plt.subplots(figsize=(3.5 + 2.2 * len(rows), 4.2), layout="constrained")
    width = 0.8 / len(methods)
    for number, method in enumerate(methods):
        found = [row["methods"][method]["tokens"] for row in rows]
        places = [place + (number - (len(methods) - 1) / 2) * width for place in range(len(rows))]
        color = f"C{METHODS.index(method)}"
        bars = axes.bar(places, found, width * 0.92, label=method, color=color)
        axes.bar_label(bars, [short(tokens) for tokens in found], padding=2, fontsize=8)
    axes.set_yscale("log", base=2)
    top = max(found["tokens"] for row in rows for found in row["methods"].values())
    least = min(found["tokens"] or top for row in rows for found in row["methods"].values())
    axes.set_ylim(least / 4, top * 3)
    axes.yaxis.set_major_formatter(lambda tokens, _: short(tokens))
    axes.set_xticks(range(len(rows)), [row["model"]["name"] for row in rows])
    axes.set_ylabel("tokens of the longest sequence")
    memory = report["memory_bytes"] / 1e9
    axes.set_title(f"{report['gpus']} x {report['device']}, {memory:.4g} GB each", fontsize=10)
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8
    )
    figure.savefig(path, dpi=140)
    plt.close(figure)


def draw_mfu(report: Report, path: Path) -> None:
    """Bars of MFU, expected and measured, for each configuration that ran."""
    plt = _pyplot()
    rows = [row for row in report["rows"] if "skipped" not in row]
    figure, axes = plt.subplots(figsize=(9, 1.4 + 0.62 * len(rows)), layout="constrained")
    names = []
    for place, row in enumerate(rows):
        names.append(title(row).replace(": ", "\n"))
        both = row["expected"]["mfu"], row["mfu"]
        for at, share, colour in zip((0.2, -0.2), both, ("tab:gray", "tab:blue"), strict=True):
            bars = axes.barh(place - at, share, 0.38, color=colour)
            axes.bar_label(bars, [f"{share:.3f}"], padding=2, fontsize=7)
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("MFU, no recomputed FLOPs counted")
    axes.set_title(f"{rows[0]['gpus']} x {report['device']}", fontsize=10)
    handles = [plt.Rectangle((0, 0), 1, 1, color=each) for each in ("tab:gray", "tab:blue")]
    axes.set_xlim(0, 1.15 * max(max(row["mfu"], row["expected"]["mfu"]) for row in rows))
    figure.legend(
        handles, ["expected by the planner", "measured"], loc="outside lower center", ncols=2
    )
    figure.savefig(path, dpi=140)
    plt.close(figure)


def draw_memory(found: list[Estimate], measured: list[tuple[int, int]], path: Path) -> None:
    """Bytes of a GPU by part against the length of a sequence, as the planner expects them; over
    them measured peaks, (tokens, bytes).
    """
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    lengths = [each.job.seq_len for each in found]
    parts = [[each.memory[name] / 1e9 for each in found] for name in STATE_PARTS]
    peaks = [each.peak_bytes / 1e9 for each in found]
    work = [peak - sum(held) for peak, held in zip(peaks, zip(*parts, strict=True), strict=True)]
    names = [*STATE_PARTS, "a layer at work, or the loss"]
    axes.stackplot(lengths, [*parts, work], labels=names, alpha=0.85)
    if measured:
        places, bytes_ = zip(*measured, strict=True)
        peaks_gb = [each / 1e9 for each in bytes_]
        axes.plot(places, peaks_gb, "o", color="black", clip_on=False, label="measured peak")
    limit = found[0].usable_bytes / 1e9
    axes.axhline(limit, color="red", linestyle="--", linewidth=1, label=f"usable {limit:.0f} GB")
    ticks = lengths[::-1][::2]
    axes.set_xticks(ticks, [short(length) for length in ticks], fontsize=8, rotation=45)
    axes.set_xlim(lengths[0], lengths[-1])
    axes.set_ylim(0, 1.05 * max(limit, *peaks))
    axes.set_xlabel("tokens of a sequence")
    axes.set_ylabel("GB of a GPU")
    job, choice = found[0].job, asdict(found[0].choice)
    axes.set_title(
        f"{job.model.name}, a ring of {choice['ring']} {job.hardware.name}: kept are "
        f"{kept(choice)}",
        fontsize=10,
    )
    axes.legend(fontsize=8, loc="upper left")
    figure.savefig(path, dpi=140)
    plt.close(figure)


def short(tokens: float) -> str:
    """Tokens such as 96k or 1.5M, of 1024."""
    if tokens >= 1 << 20:
        return f"{tokens / (1 << 20):.3g}M"
    return f"{tokens / 1024:.3g}k" if tokens >= 1024 else f"{tokens:.0f}"


def _header(columns: list[str]) -> Iterator[str]:
    yield _line(columns)
    yield "|" + "---|" * len(columns)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
