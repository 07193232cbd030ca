"""Every way to spread a job over its GPUs, and the best of them."""

from collections.abc import Collection, Iterator
from dataclasses import fields
from itertools import product
from typing import Any

from ring_sp.estimate import Estimate, estimate
from ring_sp.exchanges import EXCHANGES
from ring_sp.job import CHECKPOINTS, SHARDS, Choice, Job, refuse
from ring_sp.layout import LAYOUTS, whole_number
from ring_sp.linear_loss import LOGITS

FF_CHUNK = 4096
"""Tokens of a chunk of the feed-forward where one is wanted: products large enough to be fast."""
AS_GOOD = 1.02
"""Times of a step by so little apart are the same to a planner: the simpler choice is taken."""
LONGEST_RING = 128
"""Stations up to which a single ring is tried beside a double one; its hops are slow to count."""
SPLIT = ("tensor", "data", "outer", "ring", "ulysses")


def search(job: Job, fixed: dict[str, Any]) -> list[Estimate]:
    """All choices with these fields."""
    return [estimate(job, choice) for choice in choices(job, fixed)]


def best_of(found: list[Estimate]) -> Estimate:
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
    kept = CHECKPOINTS.index(choice.checkpoint) + (choice.ff_chunk is not None) + choice.offload
    return axes + kept + SHARDS.index(choice.shard), each.seconds


def check_fixed(fixed: dict[str, Any]) -> None:
    """Raise ValueError for fields that `Choice` has not, or values that a field cannot have."""
    names: dict[str, Collection[str]] = {"checkpoint": CHECKPOINTS, "shard": SHARDS}
    names |= {"layout": LAYOUTS, "exchange": EXCHANGES}
    unknown = fixed.keys() - {field.name for field in fields(Choice)}
    if unknown:
        raise ValueError(f"a choice has {[f.name for f in fields(Choice)]}; got {sorted(unknown)}")
    for name, value in fixed.items():
        if name in names and value not in names[name]:
            raise ValueError(f"{name} must be one of {', '.join(names[name])}; got {value!r}")
        if name == "offload" and not isinstance(value, bool):
            raise ValueError(f"offload must be True or False; got {value!r}")
        counted = name not in {*names, "offload"}
        if counted and (value is not None or name in SPLIT) and whole_number(name, value) < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")


def choices(job: Job, fixed: dict[str, Any], checked: bool = True) -> Iterator[Choice]:
    """Every choice with the fixed fields, the simplest first."""
    for sizes in _splits(job, fixed):
        loss_chunk = max(1, LOGITS * sizes["tensor"] // job.model.vocab)
        span = sizes["tensor"] * sizes["ulysses"] * sizes["ring"] * sizes["outer"]
        copies = job.in_host(span) and sizes["ring"] > 2
        base = {"loss_chunk": loss_chunk, "exchange": "copies" if copies else "messages"} | fixed
        searched = {
            "shard": SHARDS,
            "checkpoint": CHECKPOINTS,
            "ff_chunk": (None, FF_CHUNK),
            "offload": (False, True),
        }
        searched |= {name: (fixed[name],) for name in searched.keys() & fixed.keys()}
        for options in product(*searched.values()):
            choice = Choice(**base | sizes | dict(zip(searched, options, strict=True)))
            if choice.offload and choice.checkpoint == "none" and "offload" not in fixed:
                continue
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
                stations = max(1, after_data // ulysses)
                inside = max(1, host // (tensor * ulysses))
                double = stations // inside if stations % inside == 0 else 1
                single = () if double > 1 and stations > LONGEST_RING else (1,)
                outers = [fixed["outer"]] if "outer" in fixed else sorted({*single, double})
                for outer in outers:
                    ring = fixed.get("ring", max(1, stations // outer))
                    yield dict(zip(SPLIT, (tensor, data, outer, ring, ulysses), strict=True))
