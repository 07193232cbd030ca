"""The Hugging Face example, run as its users run it."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")

SCRIPT = Path(__file__).parents[1] / "examples" / "huggingface" / "train.py"
SMALL = "--layers 1 --hidden-size 64 --seq-len 129 --steps 4"


def train(ranks: int, arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(ranks), str(SCRIPT), *SMALL.split(), *arguments.split()]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_losses_over_a_ring_are_those_of_one_process(tmp_path: Path) -> None:
    log = tmp_path / "runs" / "one.json"
    family = f"--family qwen3 --output {tmp_path}"
    alone = train(1, f"{family} --losses {log}")
    assert alone.returncode == 0, alone.stderr
    ringed = train(4, f"{family} --ring 2 --gradient-checkpointing --same-as {log}")
    assert ringed.returncode == 0, ringed.stderr
    assert f"losses and gradient norms are those of {log}" in ringed.stdout

    other = train(2, f"{family} --ring 2 --lr 0.01 --same-as {log}")
    assert other.returncode != 0 and "losses and gradient norms differ" in other.stderr
