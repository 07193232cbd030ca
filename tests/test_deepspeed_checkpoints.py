"""A checkpoint of DeepSpeed's goes on, also at another ring size, as if nothing had happened."""

import subprocess
import sys
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


def resumed(run: Run, folder: Path, tag: str, exactly: Wanted) -> list[tuple[float, str]]:
    """How far the steps after the first are from those of one process; see `errors`."""
    engine = engine_of(run)
    path, _ = engine.load_checkpoint(folder, tag=tag)
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
    for worst, *_ in world(4).run(resumed, after, tmp_path, "one", wanted(after)):
        assert worst[0] < 1, worst


@pytest.mark.parametrize("stage", [1, 3])
def test_a_universal_checkpoint_goes_on_with_fewer_ranks(
    world: Callable[[int], World], tmp_path: Path, stage: int
) -> None:
    before = Run("Llama", stage, 2, accumulation=2, adam=True)
    world(4).run(saved, before, tmp_path)
    convert = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    convert += ["--input_folder", str(tmp_path / "one"), "--output_folder", str(tmp_path / "all")]
    convert += ["--num_extract_workers", "1", "--num_merge_workers", "1", "--inject_missing_state"]
    done = subprocess.run(convert, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    universal = {"checkpoint": {"load_universal": True}}
    after = Run("Llama", stage, 2, "striped", accumulation=4, adam=True, config=universal)
    for worst, *_ in world(2).run(resumed, after, tmp_path, "all", wanted(after, 2)):
        assert worst[0] < 1, worst
