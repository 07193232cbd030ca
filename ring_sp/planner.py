"""A plan: how best to spread a training step over GPUs, why, and what to do if it does not fit."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from ring_sp.estimate import Estimate
from ring_sp.job import Job, explained, refuse
from ring_sp.layout import LAYOUTS
from ring_sp.search import FF_CHUNK, SPLIT, best_of, check_fixed, choices, search
from ring_sp.step_time import Link

MEASURED_COPIES = 2
"""GPUs with which copies were measured (examples/benchmarks/RESULTS.md)."""


@dataclass(frozen=True)
class Plan:
    """The best choice for a job and why; `remedies` say what would make it fit if it does not."""

    best: Estimate
    reasons: dict[str, str]
    hiding: tuple[str, ...]
    """Whether transfers hide behind attention."""
    advice: tuple[str, ...]
    """When another way than a ring is better."""
    remedies: tuple[str, ...]


def plan(job: Job, **fixed: Any) -> Plan:
    """The fastest choice that fits, or if none does the one that lacks the fewest bytes; `fixed`
    are fields of `Choice` that are given.

    Raises ValueError for fields that are unknown or have no such value, and where nothing is left
    to choose.
    """
    check_fixed(fixed)
    sizes = {name: fixed[name] for name in SPLIT if name in fixed}
    divided = job.gpus % prod(sizes.values()) == 0
    found = search(job, fixed) if divided else []
    if not found:
        tried = {refuse(job, choice) for choice in choices(job, fixed, checked=False)}
        reasons = tried if divided else {f"{sizes} do not make {job.gpus} GPUs"}
        raise ValueError(
            f"no way to spread {job.gpus} GPUs with {fixed}: "
            f"{'; '.join(sorted(filter(None, reasons)))}. Leave out some of these options, or "
            f"change the number of GPUs."
        )
    best = best_of(found)
    return Plan(
        best,
        {**_reasons(best, found), **_rules(best)},
        tuple(_hiding(best)),
        tuple(_advice(best, found)) if best.fits else (),
        () if best.fits else tuple(_remedies(best, fixed)),
    )


def _reasons(best: Estimate, found: list[Estimate]) -> dict[str, str]:
    """For each field that was searched, the best of each other value beside it."""
    reasons = {}
    for name in (*SPLIT, "checkpoint", "ff_chunk", "shard", "offload"):
        own = getattr(best.choice, name)
        others = dict.fromkeys(getattr(each.choice, name) for each in found)
        rivals = [
            best_of([each for each in found if getattr(each.choice, name) == value])
            for value in others
            if value != own
        ]
        told = [f"{getattr(each.choice, name)} {_beside(each, best)}" for each in rivals]
        reasons[name] = "; ".join(told) or "the only one that was allowed"
    return reasons


def _beside(rival: Estimate, best: Estimate) -> str:
    if not rival.fits:
        return f"lacks {rival.missing_bytes / 1e9:.1f} GB at best"
    return f"takes {rival.seconds / best.seconds - 1:+.1%}"


def _rules(best: Estimate) -> dict[str, str]:
    """Why the layout and the exchange."""
    job, choice = best.job, best.choice
    if choice.stations == 1:
        return {"layout": "one station holds all", "exchange": "nothing goes round"}
    balances = {
        name: best.told.balance
        if name == choice.layout
        else explained(job, replace(choice, layout=name)).balance
        for name in LAYOUTS
        if name == choice.layout or choice.stations <= 64
    }
    layout = ", ".join(f"{name} {share:.3f}" for name, share in balances.items())
    copies = (
        "copy engines leave the multiprocessors to attention; "
        f"measured on {MEASURED_COPIES} GPUs only"
    )
    messages = (
        "between two GPUs copies were no faster"
        if job.in_host(choice.tensor * choice.sequence)
        else "NCCL reaches other hosts"
    )
    gather = "asked for; not measured on more than two GPUs, so never chosen unasked"
    exchanges = {"copies": copies, "messages": messages}
    return {
        "layout": f"balance of the causal mask: {layout}",
        "exchange": exchanges.get(choice.exchange, gather),
    }


def _hiding(best: Estimate) -> Iterator[str]:
    """Each kind of hop against the attention over it, and the law for it: c >= 2gF/B tokens a
    station in forward, 1.6 or 2.4 gF/B in backward where sums travel in bf16 or float32.
    """
    job, choice = best.job, best.choice
    if choice.ulysses > 1:
        alone = sum(each.alone for each in best.attention) * 1e3
        yield f"all-to-alls of a layer (and sums on their way home): {alone:.2f} ms, never hidden"
    for link in best.offloading:
        yield f"{link.name}, a checkpoint: {_under(link, 'a checkpoint of layers')}"
    ratio = best.told.kv_heads / best.told.heads
    rates = job.hardware.attention_rates(job.model.head_dim)
    station = max(load.tokens for load in best.told.loads) * choice.ulysses
    for name, each, rate, factor in zip(
        ("forward", "backward"),
        best.attention,
        rates,
        (2.0, 1.6 if choice.stations == 2 else 2.4),
        strict=True,
    ):
        for link in each.links:
            inner = choice.ring if link.name == "outer" else 1
            least = factor * ratio * rate / link.rate / inner
            # A message of queries is another size than the law's of keys.
            law = f"{factor} g F / B" + (f" / {inner}" if inner > 1 else "")
            holds = f"; {law} = {least:,.0f} tokens, {station:,} here"
            turned = name == "backward" and best.told.backward_travels == "queries"
            yield f"{name}, {link.name}: {_under(link, 'attention')}{'' if turned else holds}"


def _under(link: Link, work: str) -> str:
    return (
        f"{link.num_bytes / 1e6:,.1f} MB at {link.rate / 1e9:,.0f} GB/s take "
        f"{link.seconds * 1e3:.2f} ms under {link.cover * 1e3:.2f} ms of {work}: "
        f"{'NOT hidden' if link.exposed else 'hidden'}"
    )


def _advice(best: Estimate, found: list[Estimate]) -> Iterator[str]:
    """When not to use a ring: data parallelism where a GPU holds a sequence; Ulysses where heads
    suffice.
    """
    job, choice = best.job, best.choice
    if job.gpus == 1:
        return
    many = replace(job, batch=job.gpus)
    alone = best_of(search(many, {"tensor": 1, "data": job.gpus}))
    if choice.sequence > 1 and alone.fits and alone.tokens_per_second > best.tokens_per_second:
        yield (
            f"no ring, if a batch of {job.gpus} sequences will do: one GPU holds a whole sequence "
            f"({alone.peak_bytes / 1e9:.1f} GB), and data parallelism trains "
            f"{alone.tokens_per_second:,.0f} tokens/s instead of {best.tokens_per_second:,.0f}"
        )
    elif choice.sequence == 1:
        yield "no ring: sequences are whole on their GPUs, which is the least communication"
    elif not alone.fits:
        yield f"a sequence needs several GPUs: one lacks {alone.missing_bytes / 1e9:.1f} GB"
    traded = [each for each in found if each.choice.stations == 1 and each.choice.ulysses > 1]
    if choice.stations == 1 and choice.ulysses > 1:
        yield "no ring: heads suffice for Ulysses, whose all-to-alls cost less than visits here"
    elif choice.stations > 1 and traded:
        beside = _beside(best_of(traded), best)
        yield f"a ring: Ulysses without one {beside}; what is as good as the fastest is simplest"
    elif choice.stations > 1:
        every = choices(job, {"data": choice.data})
        able = any(each.stations == 1 and each.ulysses > 1 for each in every)
        yield (
            "a ring, as Ulysses alone was not among what was allowed"
            if able
            else f"a ring: Ulysses alone cannot spread {job.model.heads} heads over "
            f"{job.gpus // choice.data} GPUs, {job.hardware.gpus_per_host} a host"
        )


def _remedies(best: Estimate, fixed: dict[str, Any]) -> Iterator[str]:
    """What would make a plan fit that does not."""
    job = best.job
    if fixed:
        free = best_of(search(job, {}))
        if free.fits:
            chosen = {name: getattr(free.choice, name) for name in fixed}
            yield f"leave the choice to the planner: {chosen} fits"
    # Whatever keeps the least; the fastest is for another call.
    small = {"checkpoint": "full", "ff_chunk": FF_CHUNK, "shard": "all", "ulysses": 1, "data": 1}

    def fit(gpus: int = job.gpus, seq_len: int = job.seq_len) -> bool:
        return any(each.fits for each in search(replace(job, gpus=gpus, seq_len=seq_len), small))

    more = next((n for n in (job.gpus << i for i in range(5)) if fit(gpus=n)), None)
    yield (
        f"{more} GPUs with full checkpointing, chunks, FSDP and, if need be, offloading"
        if more
        else f"not even {job.gpus * 16} GPUs: a smaller model, or more memory a GPU"
    )
    longest = 0 if more == job.gpus else _longest(job, lambda length: fit(seq_len=length))
    if longest:
        yield f"at most {longest:,} tokens on {job.gpus} GPUs, with the same"


def _longest(job: Job, fits: Callable[[int], bool]) -> int:
    """The longest sequence, to 1 part in 16, that fits; 0 if none does."""
    low, high = 0, job.seq_len
    while high - low > max(high // 16, job.gpus):
        middle = (low + high) // 2
        low, high = (middle, high) if middle >= job.gpus and fits(middle) else (low, middle)
    return low
