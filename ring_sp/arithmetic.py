"""The arithmetic of a plan, line by line, to be followed with a pencil."""

from collections.abc import Iterator

from ring_sp import step_memory
from ring_sp.estimate import Estimate
from ring_sp.step_memory import GRADIENT, RESERVE, STATES, WEIGHT
from ring_sp.step_time import LAYER_SHARE


def arithmetic(best: Estimate) -> Iterator[tuple[str, str]]:
    """What is computed, and how: bytes in GB (1e9), FLOPs in PFLOP (1e15) or smaller."""
    job, choice, told = best.job, best.choice, best.told
    model, hardware, parts = job.model, job.hardware, best.memory
    tokens = max(load.tokens for load in told.loads)
    embeddings = 1 if model.tied else 2
    yield (
        "weights",
        (
            f"{model.layers} layers x {model.layer_weights / 1e6:.1f}M + {embeddings} x "
            f"{model.vocab:,} x {model.hidden:,} = {model.weights / 1e9:.2f}B"
        ),
    )
    ranks = f"/ {choice.sharing} ranks that share them"
    each = (
        f"({WEIGHT} + {GRADIENT} + {STATES} {ranks}) bytes"
        if choice.shard == "optimizer"
        else f"({WEIGHT} + {GRADIENT} + {STATES}) bytes {ranks}, and two layers gathered,"
    )
    states = sum(parts[name] for name in ("weights", "gradients", "optimizer"))
    yield (
        "weights, gradients, Adam",
        f"{model.weights / 1e9:.2f}B / tensor {choice.tensor} x {each} = {states / 1e9:.1f} GB",
    )
    yield (
        "tokens a rank",
        f"{job.seq_len:,} / {choice.sequence} = {tokens:,}",
    )
    kept = parts["activations kept"] * choice.tensor / tokens
    yield (
        "activations kept",
        (
            f"{kept:,.0f} bytes a token ({choice.checkpoint} checkpointing of {choice.every} of "
            f"{model.layers} layers{', offloaded' if choice.offload else ''}) x {tokens:,} / "
            f"tensor {choice.tensor} = {parts['activations kept'] / 1e9:.1f} GB"
        ),
    )
    work = {
        "attention work + ring buffers": parts["attention work"] + parts["ring buffers"],
        "feed-forward work": parts["feed-forward work"],
        "logits": parts["logits"],
    }
    yield (
        "at once beside them",
        "the largest of "
        + ", ".join(f"{name} {num_bytes / 1e9:.1f}" for name, num_bytes in work.items())
        + f" = {max(work.values()) / 1e9:.1f} GB",
    )
    yield (
        "peak",
        (
            f"{states / 1e9:.1f} + {parts['activations kept'] / 1e9:.1f} + "
            f"{max(work.values()) / 1e9:.1f} = {step_memory.peak(parts) / 1e9:.1f} GB of "
            f"{hardware.memory_bytes / 1e9:.0f} GB less {RESERVE:.0%} = "
            f"{best.usable_bytes / 1e9:.1f} GB"
        ),
    )
    yield from _seconds(best, tokens)


def _seconds(best: Estimate, tokens: int) -> Iterator[tuple[str, str]]:
    job, choice, told = best.job, best.choice, best.told
    model, hardware = job.model, job.hardware
    pairs = sum(load.pairs for load in told.loads) // choice.ulysses
    linear = 6 * model.product_weights * job.seq_len
    attention = model.flops(job.seq_len, pairs) - linear
    yield (
        "FLOPs of a sequence",
        (
            f"6 x {model.product_weights / 1e9:.2f}B x {job.seq_len:,} + 12 x {model.layers} "
            f"layers x {model.heads} heads x {model.head_dim} x {pairs:.4g} pairs = "
            f"{scaled(linear, 'FLOP')} + {scaled(attention, 'FLOP')} = "
            f"{scaled(linear + attention, 'FLOP')}"
        ),
    )
    load = max(told.loads, key=lambda load: load.pairs)
    for name, flops, rate, each in zip(
        ("forward", "backward"),
        (4, 10),
        hardware.attention_rates(model.head_dim),
        best.attention,
        strict=True,
    ):
        work = flops * told.heads * model.head_dim * load.pairs
        yield (
            f"attention {name}, a layer",
            (
                f"{flops} x {told.heads} heads x {model.head_dim} x {load.pairs:.4g} pairs at "
                f"{scaled(rate, 'FLOP/s')} = {_ms(work / rate)}; with folding, "
                f"{load.hops + 1} visits {_ms(each.seconds)}"
            ),
        )
    local = tokens * job.batch // choice.data
    yield (
        "matrix products",
        (
            f"6 x {model.product_weights / 1e9:.2f}B x {local:,} / tensor {choice.tensor} at "
            f"{LAYER_SHARE} x {scaled(hardware.matmul_rate, 'FLOP/s')} = "
            f"{best.times['matrix products']:,.3g} s"
        ),
    )
    yield (
        "step",
        " + ".join(f"{seconds:,.3g}" for seconds in best.times.values())
        + f" = {best.seconds:,.4g} s = {best.seconds / 3600:.2g} hours ({', '.join(best.times)})",
    )
    yield (
        "MFU",
        (
            f"{scaled(best.flops, 'FLOP')} / {best.seconds:,.4g} s / {job.gpus} GPUs / "
            f"{scaled(hardware.peak_flops, 'FLOP/s')} = {best.mfu:.3f}"
        ),
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms" if seconds >= 0.1 else f"{seconds * 1e3:.3g} ms"


def scaled(value: float, unit: str) -> str:
    """In the largest of peta, tera, giga and mega of the unit that leaves a digit before the
    point, to three digits at least.
    """
    top = 1e12 if unit.endswith("/s") else 1e15  # Rates are told in TFLOP/s.
    prefixes = {1e15: "P", 1e12: "T", 1e9: "G", 1e6: "M"}
    scale = next((each for each in prefixes if value >= each <= top), 1e6)
    found = value / scale
    return f"{found:,.{0 if found >= 100 else 1 if found >= 10 else 2}f} {prefixes[scale]}{unit}"
