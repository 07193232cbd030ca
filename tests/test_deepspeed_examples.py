"""The DeepSpeed examples, run as their users run them."""

import json
import os
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from conftest import World

pytest.importorskip("transformers")
pytest.importorskip("deepspeed")
import ring_sp.integrations.deepspeed  # noqa: F401  for ranks to start with

EXAMPLES = Path(__file__).parents[1] / "examples" / "deepspeed"
STEP = re.compile(r"step \d+: loss (\S+)  gradient norm (\S+)")


def measured(printed: str) -> list[float]:
    """The loss and gradient norm of two steps."""
    found = [float(number) for step in STEP.findall(printed) for number in step]
    assert len(found) == 4, printed
    return found


def launched(script: str, arguments: str) -> list[float]:
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", str(EXAMPLES / script), *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return measured(done.stdout)


def started(script: str, arguments: str) -> list[float]:
    """As `launched`, by ranks that have imported everything."""
    world = World(2)
    printed = world.run(main, script, arguments.split())
    world.close()
    return measured(printed[0])


def main(script: str, arguments: list[str]) -> str:
    """What a script prints on this rank."""
    import torch.distributed as dist

    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(dist.get_rank())
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(EXAMPLES))
    with redirect_stdout(StringIO()) as printed:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    return printed.getvalue()


def test_a_gpt_trains_alike_on_any_ring(tmp_path: Path) -> None:
    given, other = EXAMPLES / "ds_config.json", tmp_path / "ds_config.json"
    config = json.loads(given.read_text())
    config["sequence_parallel_ring"]["size"] = 1
    config["zero_optimization"]["stage"] = 3
    other.write_text(json.dumps(config))
    small = "--num-layers 1 --hidden-size 32 --seq-length 65 --train-iters 2 --deepspeed_config"
    ringed = launched("pretrain_gpt.py", f"{small} {given}")
    assert ringed == pytest.approx(started("pretrain_gpt.py", f"{small} {other}"), rel=1e-5)


def test_a_llama_trains_alike_with_deepspeeds_tiles() -> None:
    small = "--hidden-size 32 --ffn-hidden-size 48 --seq-length 65 --train-iters 2"
    small += " --train-batch-size 4 --sequence-parallel-ring"
    alone = started("pretrain_llama.py", f"{small} 1 --zero-stage 1")
    for tiled in ("2 --tiles 3 --activation-checkpointing", "2 --tiles 2 --zero-stage 2"):
        assert started("pretrain_llama.py", f"{small} {tiled}") == pytest.approx(alone, rel=1e-5)
