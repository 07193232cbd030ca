"""The command line: what it prints, where, and its exit codes."""

import argparse
import io
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from importlib import util
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import World

from ring_sp import Topology, bench, cli, doctor, hardware
from ring_sp.attention import ring_attention
from ring_sp.doctor import Finding
from ring_sp.group import Group

Said = tuple[int, str, str]


def said(*arguments: str) -> Said:
    """The exit code of a command, and what it prints and complains."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = cli.main(arguments)
    return code, out.getvalue(), err.getvalue()


def without(package: str) -> Any:
    find = util.find_spec
    return mock.patch.object(
        util, "find_spec", lambda name, *more: None if name == package else find(name, *more)
    )


PLAN = ("plan", "--model", "llama-8b", "--gpus", "8", "--gpu", "h200", "--seq", "1M")


def test_a_plan_as_json_needs_torch_alone() -> None:
    blocked = "import sys; sys.modules |= dict.fromkeys(('rich', 'matplotlib', 'numpy'))\n"
    call = f"from ring_sp.cli import main; sys.exit(main({[*PLAN, '--json']!r}))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", blocked + call],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["fits"] and facts["job"]["seq_len"] == 1 << 20
    assert sum(facts["seconds"].values()) == pytest.approx(2 * facts["seconds"]["step"])
    assert facts["memory"]["peak"] < facts["memory"]["usable"]


def test_tables_show_parts_choice_and_arithmetic() -> None:
    pytest.importorskip("rich")
    code, out, err = said(*PLAN, "--ring", "8")
    assert (code, err) == (0, "")
    for part in ("weights", "activations kept", "ring buffers", "attention backward", "MFU"):
        assert part in out
    assert "none lacks" in out and "hidden; 2.0 g F / B" in out and "tokens a rank" in out


def test_the_paper_is_printed_beside_its_formulas() -> None:
    pytest.importorskip("rich")
    code, out, _ = said("plan", "--paper")
    assert code == 0 and "25.0 (paper: 24.5)" in out and "4682.0" in out
    assert "73 of 79 cells as printed" in out
    assert len(json.loads(said("plan", "--paper", "--json")[1])) == 79


def test_what_is_missing_is_named_before_anything_is_computed() -> None:
    with without("rich"):
        code, out, err = said(*PLAN)
        assert (code, out) == (2, "") and "rich" in err and "pip install 'ring_sp[cli]'" in err
        assert said(*PLAN, "--json")[0] == 0
    with without("matplotlib"):
        code, _, err = said(*PLAN, "--json", "--png", "never.png")
        assert code == 2 and "matplotlib" in err and not Path("never.png").exists()


def test_curves_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "plan.png"
    for length in ("64k", "1M"):  # Which keeps all, and which has to offload.
        asked = ("plan", "--gpus", "2", "--seq", length, "--json", "--png", str(file))
        assert said(*asked)[0] == 0
    assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 20_000


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("--model", "llama-9b"), 2, "llama-8b"),
        (("--gpu", "h300"), 2, "tpu-v5e"),
        (("--tensor", "3"), 2, "do not make 8 GPUs"),
        (("--gpus", "-1"), 2, "gpus must be at least 1"),
        (("--ff-chunk", "-5"), 2, "ff_chunk must be at least 1"),
    ],
)
def test_mistakes_go_to_stderr(arguments: tuple[str, ...], code: int, text: str) -> None:
    found, out, err = said(*PLAN, "--json", *arguments)
    assert (found, out) == (code, "") and text in err and err.startswith("ring-sp plan: ")


def test_a_plan_that_does_not_fit_exits_with_1_and_says_what_would() -> None:
    pytest.importorskip("rich")
    code, out, _ = said(*PLAN, "--checkpoint", "none", "--ff-chunk", "0")
    missing = json.loads(said(*PLAN, "--checkpoint", "none", "--ff-chunk", "0", "--json")[1])
    assert code == 1 and not missing["fits"] and f"{missing['missing_bytes']:,.0f} bytes" in out
    assert "leave the choice to the planner" in out and "GB) a GPU, of its own; what" in out
    # Checkpoints of 2.2 TB for the 200 GB that a GPU may have of its host.
    code, out, _ = said("plan", "--model", "llama-8b", "--gpus", "1", "--seq", "8M")
    assert code == 1 and "GB) a GPU, of its host's memory; what would:" in out


@pytest.mark.parametrize(
    ("text", "count"), [("4096", 4096), ("128k", 131072), ("1M", 1 << 20), ("1.5k", 1536)]
)
def test_tokens_have_units(text: str, count: int) -> None:
    assert cli.tokens(text) == count


@pytest.mark.parametrize("text", ["", "k", "0", "-1k", "1x", "0.3", "nan"])
def test_what_is_no_number_of_tokens_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        cli.tokens(text)


def ranks_say(*arguments: str) -> Said:
    torch.set_num_threads(1)
    return said(*arguments)


def broken_ranks_say(rank: int) -> Said:
    """Rank `rank`'s attention loses a thousandth of one value."""

    def broken(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = ring_attention(*args, **kwargs)
        wrong = kwargs["kernel"] == "auto" and torch.distributed.get_rank() == rank
        return out * 0.999 if wrong else out

    with mock.patch.object(doctor, "ring_attention", broken):
        return said("doctor")


def test_bench_of_ranks_gives_a_file_that_plan_reads(
    world: Callable[[int], World], tmp_path: Path
) -> None:
    file = str(tmp_path / "machine.json")
    first, *others = world(3).run(ranks_say, "bench", "--json", file, "--seq", "64")
    assert first[0] == 0 and all(found == (0, "", "") for found in others)
    assert [f"hop {n} -> {(n + 1) % 3}" in first[1] for n in range(3)] == [True] * 3
    machine = hardware.find(file)
    assert {"matmul_rate", "forward_rate", "backward_rate", "link_rate"} <= {*machine.measured}
    assert machine.gpus_per_host == 3 and "network_rate" not in machine.measured
    asked = ("--model", "llama-1b", "--gpu", file, "--gpus", "1", "--seq", "1k", "--json")
    facts = json.loads(said("plan", *asked)[1])
    assert facts["hardware"]["matmul_rate"] == machine.matmul_rate and not facts["fits"]


def test_bench_alone_says_that_it_saw_no_links() -> None:
    code, out, _ = said("bench", "--seq", "32")
    assert code == 0 and "run under torchrun" in out and "hop" not in out


def test_what_was_measured_is_printed_even_if_its_file_cannot_be_written(tmp_path: Path) -> None:
    code, out, err = said("bench", "--seq", "32", "--json", str(tmp_path / "none" / "x.json"))
    assert code == 2 and "matrix products" in out and "x.json" in err


@pytest.mark.parametrize(("total", "usable"), [(42e9, 42e9), (85e9, 80e9)])
def test_a_measured_gpu_has_its_own_memory(total: float, usable: float) -> None:
    group = Group(Topology(), torch.device("cuda"), ("host",))
    found = mock.Mock(total_memory=int(total))
    found.name = "NVIDIA A100-SXM4"
    with mock.patch.object(torch.cuda, "get_device_properties", return_value=found):
        machine = bench._hardware(group, {"matmul_rate": 2e14}, ())
    assert (machine.memory_bytes, machine.matmul_rate, machine.name) == (usable, 2e14, found.name)


def test_a_doctor_finds_a_healthy_ring_healthy(world: Callable[[int], World]) -> None:
    first, *others = world(3).run(ranks_say, "doctor")
    assert first[0] == 0 and "round trip, float64" in first[1] and "WRONG" not in first[1]
    assert "it runs on CUDA, not on cpu" in first[1] and "3 on 1 hosts" in first[1]
    assert all(found == (0, "", "") for found in others)
    code, alone, _ = said("doctor")
    assert code == 0 and "only the kernel is checked" in alone


@pytest.mark.parametrize("rank", [0, 2])
def test_a_wrong_round_trip_on_any_rank_is_wrong_on_all(
    world: Callable[[int], World], rank: int
) -> None:
    first, *others = world(3).run(broken_ranks_say, rank)
    assert first[0] == 1 and "WRONG error 1.0e-03" in first[1] and "do not train" in first[1]
    assert all(found == (1, "", "") for found in others)


def test_links_that_fail_are_told_from_mistakes() -> None:
    failed = mock.Mock(side_effect=torch.distributed.DistError("timed out"))
    with mock.patch.object(cli, "alone_or_together", failed):
        code, out, err = said("doctor")
    assert (code, out) == (1, "") and "timed out" in err and "NCCL_DEBUG=INFO" in err


def test_a_doctor_says_what_to_do_about_an_apex_that_is_not_nvidias() -> None:
    other = "apex 0.9 (authentication)", frozenset[str]()
    with mock.patch.object(doctor, "apex", return_value=other):
        findings = list(doctor._hosts())
    (found,) = (each for each in findings if each.remedy)
    assert "not NVIDIA's" in found.what and "pip uninstall apex" in found.remedy
    told = "\n".join(doctor.lines([*findings, Finding("x", "fine")]))
    assert "what to do\n  apex: " in told and told.count("! ") == 1
