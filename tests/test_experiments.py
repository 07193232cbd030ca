"""The experiments on CPUs: the planner's bytes against bytes counted at full size, and each script
from end to end with a small model.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import max_context
import mfu as mfu_script
import pytest
import render
import torch
from counted import Counted
from mfu import case, form
from step import Clock, Form, Training
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ring_sp import Topology, hardware, linear_loss, model_shape
from ring_sp.estimate import Estimate, estimate
from ring_sp.job import Choice, Job
from ring_sp.model_shape import ModelShape
from ring_sp.step_memory import kernel_work
from ring_sp.step_time import weights_again

K = 1 << 10
FORMS: dict[str, dict[str, Any]] = {
    "all is kept": {},
    "feed-forward by chunks": {"ff_chunk": 4 * K},
    "attention kept": {"checkpoint": "selective"},
    "attention not kept": {"checkpoint": "full"},
    "every 2 layers": {"checkpoint": "full", "every": 2},
    "every 2 layers, attention kept": {"checkpoint": "selective", "every": 2},
    "as the paper": {"checkpoint": "full", "ff_chunk": 4 * K},
    "attention kept, chunks": {"checkpoint": "selective", "ff_chunk": 4 * K},
    "every 4 layers, chunks": {"checkpoint": "selective", "every": 4, "ff_chunk": 4 * K},
    "offloaded": {"checkpoint": "selective", "ff_chunk": 4 * K, "offload": True},
    "offloaded, without attention": {"checkpoint": "full", "offload": True},
}


def expected(model: str, tokens: int, **choice: Any) -> Estimate:
    job = Job(model_shape.find(model), hardware.find("h200"), 1, tokens)
    return estimate(job, Choice(**{"loss_chunk": 8 * K} | choice))


def counted_peak(found: Estimate) -> int:
    """Bytes of a step's forward and backward, of tensors with the sizes of the real ones and no
    content; what is inside of attention's kernel is the planner's own number.
    """
    tokens = found.job.seq_len
    inside = {"ring_sp::attention_backward": lambda *_: kernel_work(found.job.model) * tokens}
    product = linear_loss._product

    def as_on_cuda(*args: Any) -> torch.Tensor:
        with counted.paused():  # CPUs have no bf16 product with a float32 result, and make copies.
            out = product(*args)
        return counted.add(out)

    with (
        FakeTensorMode(),
        Counted(inside) as counted,
        mock.patch.object(linear_loss, "_product", as_on_cuda),
    ):
        device = torch.device("cpu")
        training = Training(Form(found.job.model, found.choice), Topology(), device, counted)
        counted.reset_peak()
        training.differentiate(tokens, 0, Clock(device))
    return counted.peak


@pytest.mark.parametrize("form", FORMS)
def test_bytes_are_those_of_each_form_counted_at_full_size(form: str) -> None:
    found = expected("llama-1b:layers=4", 64 * K, **FORMS[form])
    assert found.peak_bytes == pytest.approx(counted_peak(found), rel=0.005)


@pytest.mark.parametrize("form", FORMS)
def test_products_are_run_again_as_often_as_expected(form: str) -> None:
    sizes = "layers=4,hidden=64,heads=4,kv_heads=2,head_dim=16,ffn=256,vocab=128"
    chosen = FORMS[form] | ({"ff_chunk": 4} if "ff_chunk" in FORMS[form] else {})
    found, tokens = expected(f"llama-1b:{sizes}", 256, **chosen), 256
    model, device = found.job.model, torch.device("cpu")
    training = Training(Form(model, found.choice), Topology(), device)
    with FlopCounterMode(display=False) as counter:
        training.differentiate(tokens, 0, Clock(device))
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for kind, count in counts.items() if "mm" in str(kind))
    again = weights_again(model, found.choice) * model.layers
    assert products == pytest.approx((6 * model.product_weights + 2 * again) * tokens, rel=1e-6)


@pytest.mark.filterwarnings("error:Accessing the data pointer")
@pytest.mark.parametrize("form", ["attention kept", "every 2 layers"])
def test_bytes_of_other_shapes(form: str) -> None:
    for model in ("qwen3-0.6b:layers=6", "llama-8b:layers=4"):
        found = expected(model, 32 * K, loss_chunk=2 * K, **FORMS[form])
        assert found.peak_bytes == pytest.approx(counted_peak(found), rel=0.005)


TINY = ModelShape("tiny", 2, 64, 4, 2, 16, 128, 256, tied=True)


def run_in_place(main: Callable[[], None], *arguments: str) -> None:
    """A script of examples/experiments with these arguments."""
    with mock.patch.object(sys, "argv", [f"{main.__module__}.py", *arguments]):
        main()


def test_the_experiments_run_on_cpus_and_are_rendered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "tiny.json"
    model.write_text(json.dumps(asdict(TINY)))
    mfu, context = tmp_path / "mfu.json", tmp_path / "max_context.json"
    kept = ("1 64 none", "2 64 selective:ff_chunk=16", "2 60 full:every=2,offload=true")
    cases = [f"{model} {each}" for each in kept]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    asked = [mfu_script.__file__, "--steps", "1", "--cases", *cases, "--json", str(mfu)]
    subprocess.run([sys.executable, *launcher, *asked], check=True, timeout=300)
    rows = json.loads(mfu.read_text())["rows"]
    assert [(row["seq_len"], row["batch"]) for row in rows] == [(64, 2), (128, 1), (120, 1)]
    for row in rows:
        assert math.log(256) - 0.5 < row["loss"] < math.log(256) + 1 and row["seconds"] > 0
        assert row["seconds"] == pytest.approx(sum(row["parts"].values()))
        assert abs(row["errors"]["peak_bytes"]) < 0.1  # Of a model this small.

    limits = ("--memory", "4MB", "--chunk", "64", "--checkpoint", "selective")
    search = ("--first", "256", "--granule", "32", "--resolution", "0.1")
    wanted = ("--gpus", "2", "--models", str(model), *limits, *search, "--json", str(context))
    run_in_place(max_context.main, *wanted)
    report = json.loads(context.read_text())
    (row,) = report["rows"]
    lengths = [found["tokens"] for found in row["methods"].values()]
    assert 0 < lengths[0] < lengths[1] < lengths[2] and 1.8 < row["multiple"] < 2.1
    for found in row["methods"].values():
        held = {trial["tokens"]: trial["held_bytes"] for trial in found["trials"]}
        assert held[found["tokens"]] <= report["memory_bytes"] < held[found["failed"]]

    capsys.readouterr()
    run_in_place(render.main, str(mfu), str(context))
    shown = capsys.readouterr().out
    assert f"{lengths[3]:,} ({row['methods']['ring']['failed']:,} failed)" in shown
    assert "Of 3 configurations the planner is off at most" in shown
    assert "`mfu.py --steps 1 --cases 'tiny.json 1 64 none'" in shown
    pytest.importorskip("matplotlib")
    run_in_place(
        render.main, str(mfu), str(context), "--again", "--folder", str(tmp_path / "results")
    )
    made = {path.name for path in (tmp_path / "results").iterdir()}
    assert made == {"RESULTS.md", "mfu.png", "max_context.png", "memory.png"}


def test_a_search_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    """From the trials in its file, of which the last had begun and not ended."""
    begun = {"method": "vanilla", "tokens": 128, "fits": False, "outcome": "begun"}
    ended = begun | {"fits": True, "held_bytes": 2_600_000, "outcome": "finished"}
    settings = {"model": asdict(TINY), "gpus": 1, "memory": 2_700_000, "checkpoint": "full"}
    settings |= {"all_checkpointed": False, "chunk": 64}
    model, log = tmp_path / "tiny.json", tmp_path / "found_0.jsonl"
    model.write_text(json.dumps(asdict(TINY)))
    report = tmp_path / "found.json"
    asked = ["--gpus", "1", "--models", str(model), "--methods", "vanilla", "--resolution", "0.3"]
    asked += ["--granule", "32", "--chunk", "64", "--json", str(report), "--memory", "2.7MB"]

    lines = "".join(json.dumps(each) + "\n" for each in (settings, begun, ended))
    log.write_text(lines + json.dumps(begun | {"tokens": 160}) + "\n")
    run_in_place(max_context.main, *asked, "--resume")
    (row,) = json.loads(report.read_text())["rows"]
    kept, *tried = row["methods"]["vanilla"]["trials"]
    assert kept["held_bytes"] == 2_600_000 and not kept["seconds"]
    assert 160 in [trial["tokens"] for trial in tried] and not log.exists()
    assert all(trial["held_bytes"] > 2_700_000 and trial["seconds"] for trial in tried)

    for written, more, said in [
        (lines, [], "--resume, another"),
        (lines, ["--resume", "--memory", "2.8MB"], "has the trials of"),
        (lines + '{"method": "va', ["--resume"], "damaged"),
        ("", ["--resume"], "damaged"),
    ]:
        log.write_text(written)
        with pytest.raises(ValueError, match=said):
            run_in_place(max_context.main, *asked, *more)
        assert log.read_text() == written


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tiny 2 64", "a case is"),
        ("llama-1b two 64 none", "a case is"),
        ("foo 1 64 none", "one of"),
        ("llama-1b 0 64 none", "at least 1; got 0"),
        ("llama-1b 1 64 none:tensor=2", "a form may have .* got \\['tensor'\\]"),
    ],
)
def test_cases_that_make_no_sense_are_named(text: str, said: str) -> None:
    def understood() -> None:
        model, _, _, kept = case(text)
        model_shape.find(model)
        form(kept)

    with pytest.raises(ValueError, match=said):
        understood()
