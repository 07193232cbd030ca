"""What DeepSpeed does besides its stages leaves gradients exact, and so does an mpu."""

from collections.abc import Callable

import pytest
import torch
from conftest import World

pytest.importorskip("transformers")
pytest.importorskip("deepspeed")
from deepspeed_runs import Run, apart, destroy, engine_of, errors, one_process, step_of, wanted
from hf_models import Batch

OFFLOADED = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
SCATTER, GATHER = {"reduce_scatter": True}, {"reduce_scatter": False}


def trains_as_one_process(world: World, run: Run) -> None:
    for worst, *_ in world.run(errors, run, wanted(run)):
        assert worst[0] < 1, worst


@pytest.mark.parametrize(
    "run",
    [
        Run("Llama", 3, accumulation=2, clip=True, init=True),
        Run("GptOss", 3, ring=4, init=True),
        Run("Qwen3", 2, zero=GATHER),
        Run("Qwen3", 3, zero=GATHER, accumulation=2),
        Run("Llama", 1, zero={"overlap_comm": True}, accumulation=2),
        Run("Llama", 3, zero={"overlap_comm": True}, accumulation=2),
        Run("Llama", 2, zero={"offload_optimizer": {"device": "cpu"}}, accumulation=2, clip=True),
        Run("Llama", 3, zero=OFFLOADED, accumulation=2, clip=True),
        Run("Llama", 3, zero={"zero_hpz_partition_size": 2}),
        Run("Gemma2", 1, ring=4, checkpointing=True),
        Run("Mistral", 3, checkpointing=True, accumulation=2),
        Run("Llama", 2, hosted_checkpointing=True, accumulation=2),
        Run("Gemma2", 3, ring=4, hosted_checkpointing=True),
        Run("Qwen3", 2, ring=4, ulysses=2),
        Run("Qwen3", 3, ring=2, ulysses=2),
        Run("Llama", 1, config={"prescale_gradients": True}),
        Run("Llama", 0, config={"gradient_predivide_factor": 4}),
    ],
    ids=str,
)
def test_other_features_train_as_one_process(world: Callable[[int], World], run: Run) -> None:
    trains_as_one_process(world(4), run)


@pytest.mark.parametrize(
    "run",
    [
        *(Run("Llama", stage, accumulation=2, clip=True, mpu=True) for stage in range(4)),
        Run("Qwen3", 2, zero=GATHER, mpu=True),
        Run("Qwen3", 3, zero=GATHER, accumulation=2, mpu=True),
        Run("Llama", 3, zero={**GATHER, "contiguous_gradients": False}, mpu=True),
        Run("Llama", 3, ring=4, init=False, mpu=True),
        Run("GptOss", 1, ring=4, layout="striped", mpu=True),
    ],
    ids=str,
)
def test_an_mpu_trains_as_one_process(world: Callable[[int], World], run: Run) -> None:
    trains_as_one_process(world(4), run)


BF16 = {"bf16": {"enabled": True}}


def in_bf16(run: Run) -> tuple[torch.dtype, float, Batch]:
    """In what gradients are reduced, the loss of the first step, and its gradients."""
    engine = engine_of(run)
    loss, found = step_of(engine, run, 0)
    dtype = engine.communication_data_type
    destroy(engine)
    return dtype, loss, found


@pytest.mark.parametrize("stage", range(4))
def test_bf16_gradients_are_reduced_in_fp32_unless_asked_otherwise(
    world: Callable[[int], World], stage: int
) -> None:
    one = Run("Llama")
    exactly, roughly = (one_process(one, 1, 1, x) for x in (torch.float64, torch.bfloat16))
    rounding = apart(roughly.gradients, exactly.gradients)
    for dtype, loss, found in world(4).run(in_bf16, Run("Llama", stage, 4, config=BF16)):
        assert dtype == torch.float32
        assert abs(loss / exactly.losses[0] - 1) < 1e-2
        assert apart(found, exactly.gradients) < 2 * rounding
    asked = Run("Llama", stage, 4, config={**BF16, "communication_data_type": "bf16"})
    assert world(4).run(in_bf16, asked)[0][0] == torch.bfloat16
