"""A Trainer over a ring trains as the stock Trainer does in one process."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import World
from ringed import relative

pytest.importorskip("accelerate")
from hf_training import Outcome, Run, made, outcome, trained

from ring_sp import attention_kept

NEAR = 1e-5
"""Float32 of two orders of summation, relative."""
STREAMING = {"max_steps": 8, "accelerator_config": {"dispatch_batches": False}}


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


def checkpointing(**options: object) -> dict[str, object]:
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": options}


@pytest.mark.parametrize(
    ("size", "run"),
    [
        (4, Run(ring=4, rows=11, batch=2, accumulation=2)),
        (4, Run(ring=2, accumulation=2)),
        (4, Run(ring=2, padded=True)),
        (4, Run(ring=2, packed=True, batch=2)),
        (4, Run(ring=4, packed=True, batch=3, layout="balanced")),
        (2, Run(ring=2, options=checkpointing(use_reentrant=True))),
        (2, Run(ring=2, options=checkpointing(use_reentrant=False, context_fn=attention_kept))),
        (4, Run(ring=2, rows=12, stream=True, options=STREAMING)),
        (2, Run(ring=2, options={"train_sampling_strategy": "group_by_length"})),
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


def test_attention_dropout_does_not_depend_on_the_ring(world: Callable[[int], World]) -> None:
    run = Run(ring=4, rows=6, accumulation=2, dropout=0.3)
    alone, kept = (world(1).run(trained, replace(run, ring=1, dropout=p))[0] for p in (0.3, 0.0))
    assert not far(world(4).run(trained, run)[2], alone)
    assert any(x.startswith("loss of log 0") for x in far(kept, alone))


def seeds(run: Run) -> list[int]:
    """Of attention dropout, in two micro-batches of two steps."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = made(run, folder)
        found = []
        for trainer.state.global_step in range(2):
            whole = iter(trainer.get_train_dataloader())
            batches, _ = trainer.get_batch_samples(whole, 2, trainer.args.device)
            found += [batch["ring_sp"].dropout_seed for batch in batches]
    return found


def test_each_micro_batch_drops_by_a_seed_of_its_own(world: Callable[[int], World]) -> None:
    first, same, other, _ = world(4).run(seeds, Run(2, accumulation=2, dropout=0.3))
    assert first == same and len({*first, *other}) == 8


def resumed(run: Run, folder: str, steps: int) -> Outcome:
    """A run that was stopped in the middle of an epoch, and goes on from its checkpoint."""
    made(run, folder).train()
    dist.barrier()
    return outcome(made(run, folder), resume_from_checkpoint=f"{folder}/checkpoint-{steps}")


def test_a_resumed_run_equals_an_uninterrupted_one(
    world: Callable[[int], World], tmp_path: Path
) -> None:
    saved = {"save_strategy": "steps", "save_steps": 3, "save_only_model": False}
    run = Run(ring=2, options=saved)
    wanted = world(4).run(trained, run)
    for got, other in zip(world(4).run(resumed, run, str(tmp_path), 3), wanted, strict=True):
        assert not far(got, other)
