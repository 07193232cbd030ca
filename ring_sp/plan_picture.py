"""Memory and MFU of a plan over sequence length, as a PNG."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ring_sp.estimate import Estimate, estimate
from ring_sp.job import CHECKPOINTS
from ring_sp.step_memory import STATE_PARTS

COLOURS = ("tab:blue", "tab:orange", "tab:green")


def draw(best: Estimate, path: Path) -> None:
    """Draw the plan's split at shorter and longer sequences: bytes by part, and MFU with each
    checkpointing, dotted where it does not fit. Needs matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    lengths = _lengths(best)
    _memory(left, best, lengths)
    _mfu(right, best, lengths)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [_tokens(length) for length in lengths])
        axes.minorticks_off()
        axes.axvline(best.job.seq_len, color="gray", linestyle=":", linewidth=1)
        axes.set_xlabel("tokens of a sequence")
    job, choice = best.job, best.choice
    split = ", ".join(
        f"{name} {size}"
        for name in ("tensor", "data", "outer", "ring", "ulysses")
        if (size := getattr(choice, name)) > 1
    )
    figure.suptitle(f"{job.model.name} on {job.gpus} {job.hardware.name}: {split or 'one rank'}")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _lengths(best: Estimate) -> list[int]:
    """From a 32nd of the plan's length to four times as much."""
    seq_len = best.job.seq_len
    found = [seq_len << i >> 5 for i in range(8)]
    return [length for length in found if length >= best.choice.sequence]


def _at(best: Estimate, length: int, **changed: Any) -> Estimate:
    return estimate(replace(best.job, seq_len=length), replace(best.choice, **changed))


def _memory(axes: Any, best: Estimate, lengths: list[int]) -> None:
    found = [_at(best, length) for length in lengths]
    parts = [[each.memory[name] / 1e9 for each in found] for name in STATE_PARTS]
    peaks = [each.peak_bytes / 1e9 for each in found]
    work = [peak - sum(held) for peak, held in zip(peaks, zip(*parts, strict=True), strict=True)]
    names = [*STATE_PARTS, "work of one layer, or the loss"]
    axes.stackplot(lengths, [*parts, work], labels=names, alpha=0.85)
    limit = best.usable_bytes / 1e9
    axes.axhline(limit, color="red", linestyle="--", linewidth=1, label=f"usable {limit:.0f} GB")
    axes.set_ylim(0, min(max(*peaks, limit), 2 * limit) * 1.05)
    axes.set_ylabel("GB of a GPU")
    axes.set_title(f"memory, checkpoint: {best.choice.checkpoint}", fontsize=10)
    axes.legend(fontsize=7, loc="upper left")


def _mfu(axes: Any, best: Estimate, lengths: list[int]) -> None:
    for colour, checkpoint in zip(COLOURS, CHECKPOINTS, strict=True):
        kept: dict[str, Any] = {"checkpoint": checkpoint}
        if checkpoint == "none":
            kept |= {"every": 1, "offload": False}
        found = [_at(best, length, **kept) for length in lengths]
        axes.plot(lengths, [each.mfu for each in found], color=colour, linestyle=":")
        fitting = [each.mfu if each.fits else float("nan") for each in found]
        axes.plot(lengths, fitting, color=colour, marker="o", label=f"checkpoint: {checkpoint}")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("MFU, no recomputed FLOPs counted")
    axes.set_title("dotted: does not fit", fontsize=10)
    axes.legend(fontsize=8, loc="lower right")


def _tokens(length: int) -> str:
    if length >= 1 << 20:
        return f"{length / (1 << 20):.3g}M"
    return f"{length / 1024:.3g}k" if length >= 1024 else str(length)
