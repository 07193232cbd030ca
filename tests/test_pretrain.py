"""The pretraining example, run as its users run it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = "--num-layers 1 --hidden-size 32 --seq-length 65 --train-iters 6 --eval-interval 6"


def pretrain(ranks: int, arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(ranks), str(EXAMPLES / "pretrain_gpt.py")]
    return subprocess.run(
        [*command, *SMALL.split(), *arguments.split()], capture_output=True, text=True, check=False
    )


def losses(ranks: int, arguments: str, log: Path) -> list[dict[str, float]]:
    done = pretrain(ranks, f"{arguments} --loss-log {log}")
    assert done.returncode == 0, done.stderr
    history: list[dict[str, float]] = json.loads(log.read_text())
    return history


def state(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(folder / "step_0000006" / "tensor_00.pt")
    return loaded


def assert_same_bits(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_bits(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same_bits(one, other)
    else:
        assert a == b


def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path) -> None:
    ring, once, twice = "--sequence-parallel-ring 2", tmp_path / "once", tmp_path / "twice"
    whole = losses(2, f"{ring} --save {once}", tmp_path / "whole.json")
    first = losses(2, f"{ring} --save {twice} --exit-interval 3", tmp_path / "first.json")
    resume = f"--save {twice} --load {twice}"
    elsewhere = losses(1, f"--load {twice}", tmp_path / "elsewhere.json")
    rest = losses(2, f"{ring} {resume}", tmp_path / "rest.json")
    assert first + rest == whole
    assert_same_bits(state(once), state(twice))
    for here, there in zip(elsewhere, rest, strict=True):
        assert abs(here["loss"] - there["loss"]) < 1e-5, "another ring size goes on elsewhere"

    refused = pretrain(2, f"{resume} --tensor-model-parallel-size 2")
    assert refused.returncode != 0
    assert "was not saved with --tensor-model-parallel-size 2" in refused.stderr
    refused = pretrain(2, f"{ring} {resume} --seed 5 --lr 0.5")
    assert refused.returncode != 0
    assert "was saved with --lr 0.002, not 0.5; --seed 1234, not 5" in refused.stderr


def test_sizes_that_do_not_fit_are_refused_on_every_rank() -> None:
    done = pretrain(2, "--sequence-parallel-ring 3")
    assert done.returncode != 0
    assert "needs a multiple of 3 ranks; the world has 2" in done.stderr
