"""DeepSpeed by a Trainer's config, over a ring: what one process trains, at every stage of ZeRO."""

from collections.abc import Callable
from typing import Any

import pytest
from conftest import World

pytest.importorskip("accelerate")
pytest.importorskip("deepspeed")
from hf_training import Outcome, Run, as_a_rank, trained

AUTO = (
    "train_micro_batch_size_per_gpu",
    "train_batch_size",
    "gradient_accumulation_steps",
    "gradient_clipping",
)


def zero(stage: int) -> dict[str, Any]:
    return {
        **dict.fromkeys(AUTO, "auto"),
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "fp32",
    }


def sped(run: Run) -> Outcome:
    import deepspeed

    as_a_rank()
    deepspeed.init_distributed("gloo")
    return trained(run)


def test_every_stage_logs_the_loss_and_norm_of_one_process(world: Callable[[int], World]) -> None:
    wanted = world(1).run(trained, Run(rows=8, accumulation=4, eval_batch=4))[0]
    for stage in (0, 1, 2, 3):
        run = Run(2, 8, accumulation=2, options={"deepspeed": zero(stage)})
        for got in world(4).run(sped, run, timeout=580):
            assert len(got.history) == len(wanted.history)
            for log, other in zip(got.history, wanted.history, strict=True):
                # DeepSpeed tells no norm without ZeRO.
                for name in other.keys() - ({"grad_norm"} if stage == 0 else set()):
                    assert abs(log[name] - other[name]) <= 1e-5 * abs(other[name]), (stage, name)
