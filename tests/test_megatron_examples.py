"""The launch scripts of examples/megatron: what they say is what `ring-sp plan` says of them."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from ring_sp import cli

FOLDER = Path(__file__).parents[1] / "examples" / "megatron"
SCRIPTS = sorted(FOLDER.glob("*.sh"))


def planned(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert cli.main([*words, "--json"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return told


def halves(script: Path) -> tuple[str, list[str]]:
    """What a script says about itself, in one line, and the words of its command."""
    said, command = script.read_text().split("set -euo pipefail")
    prose = said.replace("\\\n#", " ").replace("\n#", " ")
    return re.sub(r"\s+", " ", prose), shlex.split(command.replace("\\\n", " "))


def plan_of(said: str) -> list[str]:
    found = re.search(r"ring-sp (plan (?:--[a-z-]+ [^ ]+ )+)", said)
    assert found
    return found[1].split()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_the_arithmetic_is_the_planners(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said, _ = halves(script)
    told = planned(plan_of(said), capsys)
    memory, steps = told["memory"], told["arithmetic"]
    states = sum(memory[part] for part in ("weights", "gradients", "optimizer"))
    wanted = [
        f"{states / 1e9:.1f} GB of weights",
        f"{memory['activations kept'] / 1e9:.1f} GB of activations",
        steps["activations kept"].split(" (")[0],
        f"{memory['logits'] / 1e9:.1f} GB of logits: {memory['peak'] / 1e9:.1f} GB",
        steps["FLOPs of a sequence"].split(" =")[0],
        f"Step {told['seconds']['step']:.2f} s, {told['tokens_per_second'] / 1e3:.1f}k tokens/s",
        f"MFU {told['mfu']:.2f}",
        *(
            line.split(": ")[1]
            for line in told["hiding"]
            if line.startswith("forward") and line.split(": ")[2].startswith("hidden")
        ),
    ]
    assert [each for each in wanted if each not in said] == []
    assert told["fits"]


def test_a_second_ring_costs_what_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    said, _ = halves(FOLDER / "512_gpus_70b_2m.sh")
    words = ["full" if word == "selective" else word for word in plan_of(said)]
    assert f"{planned(words, capsys)['seconds']['step']:.2f} s (--checkpoint full)" in said


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_what_is_launched_is_what_was_planned(
    script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said, command = halves(script)
    told = planned(plan_of(said), capsys)
    model, choice, job = told["model"], told["choice"], told["job"]
    wanted = {
        "--num-layers": model["layers"],
        "--hidden-size": model["hidden"],
        "--ffn-hidden-size": model["ffn"],
        "--num-attention-heads": model["heads"],
        "--num-query-groups": model["kv_heads"],
        "--seq-length": job["seq_len"],
        "--tensor-model-parallel-size": choice["tensor"],
        "--ring-outer": choice["outer"],
        "--ring-ff-chunk": choice["ff_chunk"],
        "--sequence-parallel-ring": choice["outer"] * choice["ring"],
    }
    absent = {"--tensor-model-parallel-size": "1", "--ring-outer": "1", "--ring-ff-chunk": "None"}
    given = {
        flag: command[command.index(flag) + 1] if flag in command else absent[flag]
        for flag in wanted
    }
    given["--sequence-parallel-ring"] = given["--sequence-parallel-ring"].replace("$gpus", "2")
    assert given == {flag: str(value) for flag, value in wanted.items()}
    assert job["gpus"] == choice["tensor"] * choice["outer"] * choice["ring"]
    recomputed = "--recompute-granularity" in command
    assert recomputed == (choice["checkpoint"] == "selective"), "attention is kept by default"
