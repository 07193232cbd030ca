"""How to spread a training step over GPUs: every split and checkpointing that can be is estimated,
and the fastest that fits is taken.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import product
from typing import Any

from ring_sp import step_memory, step_time
from ring_sp.explanation import Explanation
from ring_sp.job import CHECKPOINTS, SHARDS, Choice, Job, explained, refuse
from ring_sp.layout import LAYOUTS
from ring_sp.linear_loss import LOGITS
from ring_sp.step_time import Pass
from ring_sp.topology import EXCHANGES

FF_CHUNK = 4096
"""Tokens of a chunk of the feed-forward where one is wanted: products large enough to be fast."""
AS_GOOD = 1.02
"""Times of a step by so little apart are the same to a planner: the simpler choice is taken."""
SPLIT = ("tensor", "data", "outer", "ring", "ulysses")
MEASURED_COPIES = 2
"""GPUs with which copies were measured (examples/benchmarks/RESULTS.md)."""


@dataclass(frozen=True)
class Estimate:
    """What one choice costs: bytes and seconds by part, on the busiest rank."""

    job: Job
    choice: Choice
    memory: dict[str, float]
    times: dict[str, float]
    attention: tuple[Pass, Pass]
    told: Explanation

    @property
    def peak_bytes(self) -> float:
        return step_memory.peak(self.memory)

    @property
    def usable_bytes(self) -> float:
        """Of a GPU's memory."""
        return self.job.hardware.memory_bytes * (1 - step_memory.RESERVE)

    @property
    def missing_bytes(self) -> float:
        """By which it does not fit; 0 if it fits."""
        return max(0.0, self.peak_bytes - self.usable_bytes)

    @property
    def fits(self) -> bool:
        return not self.missing_bytes

    @cached_property
    def seconds(self) -> float:
        """Of a step."""
        return sum(self.times.values())

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs together."""
        return self.job.batch * self.job.seq_len / self.seconds

    @property
    def flops(self) -> int:
        """Of a step of all GPUs, nothing counted twice."""
        job, pairs = self.job, sum(load.pairs for load in self.told.loads)
        pairs //= self.choice.ulysses  # Peers see the same pairs in other heads.
        return job.batch * job.model.flops(job.seq_len, pairs)

    @property
    def mfu(self) -> float:
        """Share of the GPUs' peak FLOP/s, no recomputed FLOPs counted (arXiv:2204.02311, appendix
        B).
        """
        return self.flops / self.seconds / self.job.gpus / self.job.hardware.peak_flops


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


def estimate(job: Job, choice: Choice) -> Estimate:
    """What a choice costs. Raises ValueError for one that the job cannot have."""
    reason = refuse(job, choice)
    if reason is not None:
        raise ValueError(f"{choice} is no way to spread {job.gpus} GPUs: {reason}")
    told = explained(job, choice)
    return Estimate(
        job,
        choice,
        step_memory.memory(job, choice, told),
        step_time.times(job, choice, told),
        step_time.passes(job, choice, told),
        told,
    )


def plan(job: Job, **fixed: Any) -> Plan:
    """The fastest choice that fits, or if none does the one that lacks the fewest bytes; `fixed`
    are fields of `Choice` that are given.

    Raises ValueError for fields that are unknown or have no such value, and where nothing is left
    to choose.
    """
    _check_fixed(fixed)
    found = search(job, fixed)
    if not found:
        tried = {refuse(job, choice) for choice in _choices(job, fixed, checked=False)}
        raise ValueError(
            f"no way to spread {job.gpus} GPUs with {fixed}: {'; '.join(sorted(filter(None, tried)))}"
            f". Leave out some of these options, or change the number of GPUs."
        )
    best = _best(found)
    return Plan(
        best,
        {**_reasons(best, found), **_rules(best)},
        tuple(_hiding(best)),
        tuple(_advice(best)),
        () if best.fits else tuple(_remedies(best, fixed)),
    )


def search(job: Job, fixed: dict[str, Any]) -> list[Estimate]:
    """All choices with these fields."""
    return [estimate(job, choice) for choice in _choices(job, fixed)]


def _best(found: list[Estimate]) -> Estimate:
    """The simplest of those that are as good as the fastest; where none fits, that which lacks
    least.
    """
    fitting = [each for each in found if each.fits]
    if not fitting:
        return min(found, key=lambda each: (each.missing_bytes, each.seconds))
    fastest = min(each.seconds for each in fitting)
    return min((each for each in fitting if each.seconds <= AS_GOOD * fastest), key=_complexity)


def _complexity(each: Estimate) -> tuple[float, ...]:
    """Means beside data parallelism and one ring, and among as many the times."""
    choice = each.choice
    axes = sum(size > 1 for size in (choice.tensor, choice.ulysses, choice.outer))
    kept = CHECKPOINTS.index(choice.checkpoint) + (choice.ff_chunk is not None)
    return axes + kept + SHARDS.index(choice.shard), each.seconds


def _check_fixed(fixed: dict[str, Any]) -> None:
    names = {"checkpoint": CHECKPOINTS, "shard": SHARDS, "layout": LAYOUTS, "exchange": EXCHANGES}
    unknown = fixed.keys() - {field.name for field in fields(Choice)}
    if unknown:
        raise ValueError(f"a choice has {[f.name for f in fields(Choice)]}; got {sorted(unknown)}")
    for name, value in fixed.items():
        if name in names and value not in names[name]:
            raise ValueError(f"{name} must be one of {', '.join(names[name])}; got {value!r}")
        if name not in names and value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")


def _choices(job: Job, fixed: dict[str, Any], checked: bool = True) -> Iterator[Choice]:
    """Every choice with the fixed fields, the simplest first."""
    for sizes in _splits(job, fixed):
        loss_chunk = max(1, LOGITS * sizes["tensor"] // job.model.vocab)
        span = sizes["tensor"] * sizes["ulysses"] * sizes["ring"] * sizes["outer"]
        copies = span <= job.hardware.gpus_per_host and sizes["ring"] > 2
        base = {"loss_chunk": loss_chunk, "exchange": "copies" if copies else "messages"} | fixed
        for shard, checkpoint, ff_chunk in product(
            [fixed["shard"]] if "shard" in fixed else SHARDS,
            [fixed["checkpoint"]] if "checkpoint" in fixed else CHECKPOINTS,
            [fixed["ff_chunk"]] if "ff_chunk" in fixed else (None, FF_CHUNK),
        ):
            options = {"shard": shard, "checkpoint": checkpoint, "ff_chunk": ff_chunk}
            choice = Choice(**base | sizes | options)
            if not checked or refuse(job, choice) is None:
                yield choice


def _splits(job: Job, fixed: dict[str, Any]) -> Iterator[dict[str, int]]:
    """Sizes whose product is the number of GPUs. A double ring has the GPUs of a host as its inner
    ring.
    """
    host = job.hardware.gpus_per_host

    def sizes(name: str, rest: int, most: int) -> list[int]:
        if name in fixed:
            return [fixed[name]]
        return [size for size in range(1, min(rest, most) + 1) if rest % size == 0]

    for tensor in sizes("tensor", job.gpus, host):
        after_tensor = job.gpus // tensor
        for data in sizes("data", after_tensor, job.batch):
            after_data = after_tensor // data
            for ulysses in sizes("ulysses", after_data, max(1, host // tensor)):
                stations = after_data // ulysses
                inside = max(1, host // (tensor * ulysses))
                doubles = {1, stations // inside if stations % inside == 0 else 1}
                outers = [fixed["outer"]] if "outer" in fixed else sorted(doubles)
                for outer in outers:
                    ring = fixed.get("ring", stations // outer or 1)
                    yield dict(zip(SPLIT, (tensor, data, outer, ring, ulysses), strict=True))


def _reasons(best: Estimate, found: list[Estimate]) -> dict[str, str]:
    """For each field that was searched, the best of each other value beside it."""
    reasons = {}
    for name in (*SPLIT, "checkpoint", "ff_chunk", "shard"):
        own = getattr(best.choice, name)
        others = dict.fromkeys(getattr(each.choice, name) for each in found)
        rivals = [
            _best([each for each in found if getattr(each.choice, name) == value])
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
        "NCCL reaches other hosts"
        if choice.tensor * choice.sequence > job.hardware.gpus_per_host
        else "between two GPUs copies were no faster"
    )
    return {
        "layout": f"balance of the causal mask: {layout}",
        "exchange": copies if choice.exchange == "copies" else messages,
    }


def _hiding(best: Estimate) -> Iterator[str]:
    """Each kind of hop against the attention over it, and the law for it: c >= 2gF/B tokens a
    station in forward, 1.6 or 2.4 gF/B in backward where sums travel in bf16 or float32.
    """
    job, choice = best.job, best.choice
    ratio = best.told.kv_heads / best.told.heads
    rates = job.hardware.forward_rate, job.hardware.backward_rate
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
            yield (
                f"{name}, {link.name}: {link.num_bytes / 1e6:,.1f} MB at "
                f"{link.rate / 1e9:,.0f} GB/s take {link.seconds * 1e3:.2f} ms under "
                f"{link.cover * 1e3:.2f} ms of attention: "
                f"{'hidden' if not link.exposed else 'NOT hidden'}{'' if turned else holds}"
            )


def _advice(best: Estimate) -> Iterator[str]:
    """When not to use a ring: data parallelism where a GPU holds a sequence; Ulysses where heads
    suffice.
    """
    job, choice = best.job, best.choice
    if job.gpus == 1:
        return
    many = replace(job, batch=job.gpus)
    alone = _best(search(many, {"tensor": 1, "data": job.gpus}))
    if choice.sequence > 1 and alone.fits and alone.tokens_per_second > best.tokens_per_second:
        yield (
            f"no ring, if a batch of {job.gpus} sequences will do: one GPU holds a whole sequence "
            f"({alone.peak_bytes / 1e9:.1f} GB), and data parallelism trains "
            f"{alone.tokens_per_second:,.0f} tokens/s instead of {best.tokens_per_second:,.0f}"
        )
    elif choice.sequence == 1:
        yield "no ring: sequences are whole on their GPUs, which is the least communication"
    elif choice.stations == 1:
        yield (
            "no ring: heads suffice for Ulysses alone, whose all-to-alls cost less here than "
            "visits to the other stations"
        )
    else:
        lacking = alone.missing_bytes / 1e9
        why = f"one GPU lacks {lacking:.1f} GB" if lacking else "whole sequences are no faster"
        yield f"a ring: {why}, and Ulysses alone is slower or has too few heads"


def _remedies(best: Estimate, fixed: dict[str, Any]) -> Iterator[str]:
    """What would make a plan fit that does not."""
    job = best.job
    if fixed:
        free = _best(search(job, {}))
        if free.fits:
            chosen = {name: getattr(free.choice, name) for name in fixed}
            yield f"leave the choice to the planner: {chosen} fits"
    # Whatever keeps the least; the fastest is for another call.
    small = {"checkpoint": "full", "ff_chunk": FF_CHUNK, "shard": "all", "ulysses": 1, "data": 1}

    def fit(**changed: int) -> bool:
        return any(each.fits for each in search(replace(job, **changed), small))

    more = next((n for n in (job.gpus << i for i in range(1, 5)) if fit(gpus=n)), None)
    yield (
        f"{more} GPUs with full checkpointing, chunks and FSDP"
        if more
        else f"not even {job.gpus * 16} GPUs: a smaller model, or more memory a GPU"
    )
    longest = _longest(job, lambda length: fit(seq_len=length))
    if longest:
        yield f"at most {longest:,} tokens on {job.gpus} GPUs, with the same"


def _longest(job: Job, fits: Callable[[int], bool]) -> int:
    """The longest sequence, to 1 part in 16, that fits; 0 if none does."""
    low, high = 0, job.seq_len
    while high - low > max(high // 16, job.gpus):
        middle = (low + high) // 2
        low, high = (middle, high) if middle >= job.gpus and fits(middle) else (low, middle)
    return low
