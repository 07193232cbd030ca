"""A checkpoint of DeepSpeed's goes on, also at another ring size, as if nothing had happened."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import World

pytest.importorskip("transformers")
pytest.importorskip("deepspeed")
import torch.distributed as dist
from deepspeed_runs import Run, Wanted, compared, destroy, engine_of, step_of, wanted


def saved(run: Run, folder: Path) -> None:
    """The first step, saved."""
    engine = engine_of(run)
    step_of(engine, run, 0)
    engine.save_checkpoint(folder, tag="one")
    dist.barrier()
    destroy(engine)


def resumed(run: Run, folder: Path, exactly: Wanted) -> list[tuple[float, str]]:
    """How far the steps after the first are from those of one process; see `errors`."""
    engine = engine_of(run)
    path, _ = engine.load_checkpoint(folder, tag="one")
    assert path is not None and engine.global_steps == 1
    found = compared(engine, run, exactly, 1)
    destroy(engine)
    return found


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("rings", [(2, 2), (4, 2), (2, 4)], ids=str)
def test_a_resumed_run_is_that_of_one_process(
    world: Callable[[int], World], tmp_path: Path, stage: int, rings: tuple[int, int]
) -> None:
    """Both rings train on the same batches: data x accumulation is four."""
    before, after = (
        Run("Llama", stage, ring, layout, accumulation=ring)
        for ring, layout in zip(rings, ("zigzag", "striped"), strict=True)
    )
    world(4).run(saved, before, tmp_path)
    for worst, *_ in world(4).run(resumed, after, tmp_path, wanted(after)):
        assert worst[0] < 1, worst
