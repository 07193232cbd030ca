"""Draw the results of attention.py, and the timeline of a trace.

python examples/benchmarks/picture.py trace.json timeline.png
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
        axes.bar_label(bars, [f"{share:.2f}" if share else "" for share in found], fontsize=7)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(rows)), [row["case"] for row in rows], fontsize=8)
    axes.set_ylabel("share of the ideal (forward + backward)")
    axes.set_title(f"{facts['ranks']} x {facts['device']}, bf16, head dim 128", fontsize=10)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def kind(name: str) -> str:
    lowered = name.lower()
    if "nccl" in lowered or "sendrecv" in lowered:
        return "transfer"
    words = ("attn", "attention", "flash", "_forward", "_backward", "_dkv", "_dq")
    return "attention" if any(word in lowered for word in words) else "other"


def timeline(trace: Path, path: Path) -> None:
    """The kernels of the last step in a trace, a lane for each stream."""
    events = json.loads(trace.read_text())["traceEvents"]
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    begin = min(e["ts"] for e in kernels)
    end = max(e["ts"] + e["dur"] for e in kernels)
    kernels = [e for e in kernels if e["ts"] >= (begin + end) / 2]
    begin = min(e["ts"] for e in kernels)
    lanes = sorted({e["tid"] for e in kernels})
    figure, axes = plt.subplots(figsize=(11, 1.2 + 0.7 * len(lanes)))
    for e in kernels:
        place = (lanes.index(e["tid"]) - 0.35, 0.7)
        spans = [((e["ts"] - begin) / 1e3, e["dur"] / 1e3)]
        axes.broken_barh(spans, place, color=COLOURS[kind(e["name"])], edgecolor="white", lw=0.3)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    axes.legend(
        handles, COLOURS, ncols=3, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.25)
    )
    axes.set_yticks(range(len(lanes)), [f"stream {lane}" for lane in lanes])
    axes.set_xlabel("milliseconds")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    timeline(Path(sys.argv[1]), Path(sys.argv[2]))
