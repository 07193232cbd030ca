"""The DeepSpeed examples, run as their users run them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("deepspeed")

EXAMPLES = Path(__file__).parents[1] / "examples" / "deepspeed"
STEP = re.compile(r"step \d+: loss (\S+)  gradient norm (\S+)")


def measured(script: str, arguments: str) -> list[tuple[float, ...]]:
    """The loss and gradient norm of each step on 2 ranks."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", str(EXAMPLES / script), *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [tuple(map(float, found)) for found in STEP.findall(done.stdout)]


def test_a_gpt_trains_alike_on_any_ring(tmp_path: Path) -> None:
    config = json.loads((EXAMPLES / "ds_config.json").read_text())
    config["sequence_parallel_ring"]["size"] = 1
    config["zero_optimization"]["stage"] = 3
    other = tmp_path / "ds_config.json"
    other.write_text(json.dumps(config))
    small = "--num-layers 1 --hidden-size 32 --seq-length 65 --train-iters 2 --deepspeed_config"
    wanted, found = (
        measured("pretrain_gpt.py", f"{small} {path}")
        for path in (EXAMPLES / "ds_config.json", other)
    )
    assert len(wanted) == 2
    assert sum(found, ()) == pytest.approx(sum(wanted, ()), rel=1e-5)


def test_a_llama_trains_alike_with_deepspeeds_tiles() -> None:
    small = "--hidden-size 32 --ffn-hidden-size 48 --seq-length 65 --train-iters 2"
    small += " --train-batch-size 4"
    wanted = measured("pretrain_llama.py", f"{small} --sequence-parallel-ring 1 --zero-stage 1")
    tiled = "--sequence-parallel-ring 2 --tiles 3 --activation-checkpointing"
    found = measured("pretrain_llama.py", f"{small} {tiled}")
    assert len(wanted) == 2
    assert sum(found, ()) == pytest.approx(sum(wanted, ()), rel=1e-5)
