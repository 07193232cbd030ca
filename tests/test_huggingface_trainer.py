"""A Trainer over a ring trains as the stock Trainer does in one process."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from conftest import World
from ringed import relative

pytest.importorskip("accelerate")
from hf_training import Outcome, Run, trained

NEAR = 1e-5
"""Float32 of two orders of summation, relative."""


def far(got: Outcome, wanted: Outcome) -> list[str]:
    """In what two outcomes differ by more than rounding."""
    assert len(got.history) == len(wanted.history), (got.history, wanted.history)
    found = []
    for number, (log, other) in enumerate(zip(got.history, wanted.history, strict=True)):
        assert log.keys() == other.keys()
        found += [
            f"{name} of log {number}: {log[name]}, wanted {value}"
            for name, value in other.items()
            if abs(log[name] - value) > NEAR * abs(value)
        ]
    found += [x for x, w in wanted.weights.items() if relative(got.weights[x], w) > NEAR]
    return found


@pytest.mark.parametrize(
    ("size", "run"),
    [
        (4, Run(ring=4, rows=11, batch=2, accumulation=2)),
        (4, Run(ring=2, accumulation=2)),
        (4, Run(ring=2, padded=True)),
        (4, Run(ring=2, packed=True, batch=2)),
        (4, Run(ring=4, packed=True, batch=3, layout="balanced")),
    ],
    ids=str,
)
def test_a_trainer_over_a_ring_is_the_stock_one(
    world: Callable[[int], World], size: int, run: Run
) -> None:
    data = size // run.ring
    alone = replace(
        run, ring=0, accumulation=data * run.accumulation, eval_batch=data * run.eval_batch
    )
    wanted = world(1).run(trained, alone)[0]
    norms = [log["grad_norm"] for log in wanted.history if "grad_norm" in log]
    assert len(norms) > 4 and min(norms) > 0.05, "clipping must have an effect"
    for got in world(size).run(trained, run):
        assert not far(got, wanted)
        assert got.counts[:3] == wanted.counts[:3]
        assert abs(got.counts[3] - wanted.counts[3]) < 0.05 * wanted.counts[3]
