"""The launcher and its report, run as their users run them, and what it refuses."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from conftest import World

pytest.importorskip("megatron")
import torch
from megatron.core import parallel_state
from megatron.core.extensions import transformer_engine
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import multi_token_prediction
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron_gpt import built, case, config, start
from ranks import raised

from ring_sp import Topology
from ring_sp.integrations.megatron import MegatronRing, RingCoreAttention, RingOptions, install
from ring_sp.integrations.megatron.__main__ import main, understood
from ring_sp.integrations.megatron.rotary import use_ring_positions
from ring_sp.integrations.megatron.spec import ring_spec

ROOT = Path(__file__).parents[1]
RING = ("--sequence-parallel-ring", "1")
SCRIPT = """
import sys, torch, torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.extensions import transformer_engine
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_config import TransformerConfig

assert __name__ == "__main__"
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4,
                           use_cpu_initialization=True, attention_dropout=float(sys.argv[2]))
model = GPTModel(config, get_gpt_layer_local_spec(), vocab_size=32, max_sequence_length=8)
tokens = torch.arange(8)[None]
print(model(tokens, tokens, None).shape, sys.argv[1:],
      type(model.decoder.layers[0].self_attention.core_attention).__name__)
"""


def launched(*arguments: str | Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "ring_sp.integrations.megatron"]
    paths = [str(path)] if path else []
    inherited = os.environ.get("PYTHONPATH")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [inherited])])}
    return subprocess.run(
        [*command, *map(str, arguments)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_stock_script_trains_with_the_ring(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = launched(script, "--dropout", "0", *RING)
    assert done.returncode == 0, done.stderr
    sizes, core = "['--dropout', '0', '--context-parallel-size', '1']", "RingCoreAttention"
    assert done.stdout.strip() == f"torch.Size([1, 8, 32]) {sizes} {core}"


def exit_of(script: Path) -> str:
    """What the launcher says at its end."""
    try:
        main([str(script), *RING])
    except SystemExit as end:
        return str(end.code)
    return ""


def test_a_script_that_builds_no_model_is_no_success(
    world: Callable[[int], World], tmp_path: Path
) -> None:
    script = tmp_path / "train.py"
    script.write_text("done = 1")
    assert "built no model" in world(1).run(exit_of, script)[0]
    assert "there is no script" in world(1).run(exit_of, tmp_path / "none.py")[0]


def pretend(folder: Path, version: str, apex: dict[str, str]) -> Path:
    """A folder with a Megatron-core of some version, and an apex."""
    core = folder / "megatron" / "core"
    core.mkdir(parents=True)
    names = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
    core.joinpath("package_info.py").write_text("\n".join(f"{k} = {v}" for k, v in names))
    core.joinpath("__init__.py").write_text("raise AssertionError('imported')")
    for name, text in apex.items():
        folder.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
        folder.joinpath(name).write_text(text)
    return folder


FOREIGN = {
    "apex/__init__.py": "raise AssertionError('imported')",
    "apex-0.9.10.dist-info/METADATA": "Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10\n"
    "Summary: a toolkit for Pyramid\n",
}
NVIDIA = {"apex/__init__.py": "", "apex/multi_tensor_apply/__init__.py": "", "amp_C.py": ""}


def test_an_untested_megatron_and_a_foreign_apex_are_named(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("print('ran')")
    newer = pretend(tmp_path / "newer", "0.20.0", {})
    done = launched(script, *RING, path=newer)
    assert done.returncode != 0
    assert "tested with Megatron-core 0.16.1 to 0.19; got 0.20.0 in" in done.stderr
    foreign = pretend(tmp_path / "foreign", "0.19.2", FOREIGN)
    done = launched(script, *RING, path=foreign)
    assert done.returncode != 0
    assert "apex here is apex 0.9.10 (a toolkit for Pyramid), not NVIDIA's" in done.stderr
    assert "ran" not in done.stdout


def test_the_report_says_what_is_there_and_what_is_used(tmp_path: Path) -> None:
    folder = pretend(tmp_path, "0.19.2", NVIDIA)
    done = launched("--report", path=folder)
    assert done.returncode == 0, done.stderr
    rows = {line[:33].strip(): line[33:] for line in done.stdout.splitlines()}
    assert rows["Megatron-core"].startswith("0.19.2, with")
    assert rows["Megatron-core"].endswith(str(folder / "megatron" / "core"))
    assert rows["apex"] == "NVIDIA"
    assert rows["amp_C"].startswith("there; for multi-tensor")
    assert rows["fused_layer_norm_cuda"].startswith("missing; for fused")
    assert rows["Adam"] == "apex"
    assert rows["norms"] == "torch, tagged by ring_sp"
    assert rows["reference"] == "can serve"
    assert "--no-ring-keep-attention" in rows["recomputed attention"]
    assert "--ring-ff-chunk" in rows["dense feed-forward"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--num-layers 2", "give --sequence-parallel-ring"),
        ("--ring-layout striped", "--ring-layout striped needs --sequence-parallel-ring"),
    ],
)
def test_a_command_line_without_the_ring_is_refused(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        understood(line.split())


def test_reinforcement_learning_is_refused_at_start() -> None:
    with pytest.raises(NotImplementedError, match="the ring has no --perform-rl-step"):
        understood([*RING, "--perform-rl-step"])


def test_the_script_gets_its_own_arguments_in_their_order() -> None:
    line = "--a 1 --sequence-parallel-ring 4 -1 --ring-layout striped --b=x --sequence-parallel"
    options, untested, rest = understood(line.split())
    assert options == RingOptions(4, "striped")
    assert not untested
    assert rest == [
        "--a",
        "1",
        "-1",
        "--b=x",
        "--sequence-parallel",
        "--context-parallel-size",
        "4",
    ]


def test_transformer_engines_attention_is_replaced_too(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = type("TEDotProductAttention", (torch.nn.Module,), {})
    monkeypatch.setattr(transformer_engine, "TEDotProductAttention", fused)
    layer = get_gpt_layer_local_spec()
    layer.submodules.self_attention.submodules.core_attention = fused
    block = TransformerBlockSubmodules(layer_specs=[layer, ModuleSpec(partial(layer.module))] * 2)
    replaced, count = ring_spec(block, MegatronRing(Topology()))
    found = replaced.layer_specs[2].submodules.self_attention.submodules.core_attention
    assert (count, found.module) == (2, RingCoreAttention)
    assert layer.submodules.self_attention.submodules.core_attention is fused


class OwnAttention(torch.nn.Module):
    """Somebody's attention that the ring does not know."""

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()


def half_on() -> dict[str, str]:
    """What is said of models in which not every layer is the ring's."""
    given = case()
    start(given)
    stock_roll, build = multi_token_prediction.roll_tensor, vars(GPTModel)["__init__"]
    own = get_gpt_layer_local_spec()
    own.submodules.self_attention.submodules.core_attention = OwnAttention
    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
    made = install(given.options)
    try:
        said = {
            "own": raised(GPTModel, config(given), own, vocab_size=32, max_sequence_length=8),
            "stock": raised(
                DotProductAttention,
                *(config(given), 1, AttnMaskType.causal, "self"),
                pg_collection=groups,
            ),
        }
    finally:
        made.remove()
    assert multi_token_prediction.roll_tensor is stock_roll
    assert vars(GPTModel)["__init__"] is build
    ring = MegatronRing.from_options(given.options, parallel_state.get_context_parallel_group())
    return {**said, "removed": raised(use_ring_positions, built(given), ring)}


def test_a_model_is_the_rings_in_all_layers_or_in_none(world: Callable[[int], World]) -> None:
    (said,) = world(1).run(half_on)
    layer = "decoder.layers.0.self_attention"
    assert f"{layer} attends with OwnAttention and not with the ring" in said["own"]
    assert "DotProductAttention was asked for while the ring is installed" in said["stock"]
    assert f"{layer} attends with DotProductAttention" in said["removed"]


def heads_that_do_not_fit() -> tuple[str, bool]:
    """What is said of a model before its ring is made, and whether it was made."""
    given = case(ring=3, ulysses=3)
    start(given)
    made = install(given.options)
    try:
        return raised(built, given), made.ring is not None
    finally:
        made.remove()


def test_heads_that_ulysses_cannot_divide_are_refused_before_groups_are_made(
    world: Callable[[int], World],
) -> None:
    for said, has_ring in world(3).run(heads_that_do_not_fit):
        assert "needs a number of query heads that 3 divides; got 4" in said
        assert not has_ring


def warned(per_token: bool) -> list[str]:
    """What a model's builder is warned of."""
    given = case(ring=2, config={"calculate_per_token_loss": per_token})
    start(given)
    made = install(given.options)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            built(given)
    finally:
        made.remove()
    return [str(each.message) for each in caught if "those of one rank" in str(each.message)]


def test_a_loss_that_is_not_that_of_one_rank_is_warned_of(world: Callable[[int], World]) -> None:
    assert world(2).run(warned, True) == [[], []]
    for (said,) in world(2).run(warned, False):
        assert "without --calculate-per-token-loss" in said
