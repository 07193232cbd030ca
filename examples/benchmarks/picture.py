"""Draw the results of attention.py, and the timelines of traces.

python examples/benchmarks/picture.py TRACE.json [TRACE.json ...] TIMELINES.png
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {"transfer": "tab:orange", "attention": "tab:blue", "other": "tab:gray"}


def draw(facts: dict[str, Any], path: Path) -> None:
    """Bars of the share of the ideal, a group for each case."""
    rows = [row for row in facts["rows"] if row["ideal_ms"]]
    names = list(dict.fromkeys(n for row in rows for n in row["results"] if "one GPU" not in n))
    figure, axes = plt.subplots(figsize=(1.5 + 1.5 * len(rows), 4.2))
    width = 0.8 / max(len(names), 1)
    for number, name in enumerate(names):
        found = [row["results"].get(name, {}).get("share_of_ideal", 0) for row in rows]
        places = [place + (number - (len(names) - 1) / 2) * width for place in range(len(rows))]
        bars = axes.bar(places, found, width * 0.92, label=name)
        shares = [f"{share:.2f}" if share else "" for share in found]
        axes.bar_label(bars, shares, padding=-10, fontsize=7, color="white")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(rows)), [row["case"] for row in rows], fontsize=8)
    axes.set_ylim(0, 1.1)
    axes.set_ylabel("share of the ideal (forward + backward)")
    axes.set_title(f"{facts['ranks']} x {facts['device']}, bf16, head dim 128", fontsize=10)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def kind(name: str) -> str:
    lowered = name.lower()
    if any(word in lowered for word in ("nccl", "sendrecv", "ptop")):
        return "transfer"
    words = ("attn", "attention", "flash", "_forward", "_backward", "_dkv", "_dq")
    return "attention" if any(word in lowered for word in words) else "other"


def timelines(traces: list[Path], path: Path) -> None:
    """The kernels of the last step in each trace, a lane for each stream."""
    lasts = [last_step(trace) for trace in traces]
    lanes = [sorted({e["tid"] for e in kernels}) for kernels in lasts]
    heights = [0.6 + len(own) for own in lanes]
    figure, axes = plt.subplots(
        len(traces),
        figsize=(11, 0.8 * sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for plot, trace, kernels, own in zip(axes[:, 0], traces, lasts, lanes, strict=True):
        begin = min(e["ts"] for e in kernels)
        for e in kernels:
            place = (own.index(e["tid"]) - 0.35, 0.7)
            spans = [((e["ts"] - begin) / 1e3, e["dur"] / 1e3)]
            plot.broken_barh(
                spans, place, color=COLOURS[kind(e["name"])], edgecolor="white", lw=0.3
            )
        plot.set_title(trace.stem.replace("_", " "), fontsize=10)
        plot.set_yticks(range(len(own)), [f"stream {lane}" for lane in own])
    axes[-1][0].set_xlabel("milliseconds")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    axes[-1][0].legend(handles, COLOURS, ncols=3, fontsize=8)
    figure.savefig(path, dpi=130)


def last_step(trace: Path) -> list[dict[str, Any]]:
    """What the GPU did in the second half of a trace of two steps."""
    events = json.loads(trace.read_text())["traceEvents"]
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    begin = min(e["ts"] for e in kernels)
    end = max(e["ts"] + e["dur"] for e in kernels)
    return [e for e in kernels if e["ts"] >= (begin + end) / 2]


if __name__ == "__main__":
    *given, into = map(Path, sys.argv[1:])
    timelines(given, into)
