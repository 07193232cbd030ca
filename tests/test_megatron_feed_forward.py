"""Megatron's dense feed-forwards by chunks of tokens."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import World

pytest.importorskip("megatron")
import test_megatron_fsdp as fsdp
from megatron.core.tensor_parallel import layers as tensor_layers
from megatron.core.transformer.mlp import MLP
from megatron_gpt import LAYERS, MOE, MTP, SEQ_LEN, Case, built, case, grads, start
from megatron_on_cpu import OnCpu
from ranks import raised
from ringed import relative
from test_megatron_recomputation import forward, model_of, remembering
from test_megatron_training import FULL, Options, build, run, train
from torch import Tensor
from torch.nn.functional import silu

from ring_sp.integrations.megatron import install, use_blockwise

GATED = {"gated_linear_unit": True, "activation_func": silu, "add_bias_linear": False}
FUSED = {"gated_linear_unit": True, "activation_func": silu, "bias_activation_fusion": True}
MIXED = {**MOE, "moe_layer_freq": [0, 1]}


def stepped(given: Case, chunk: int | None) -> tuple[dict[str, Tensor], list[int]]:
    """Gradients of a step, and the rows that the first matrix product met each time."""
    model, ring = model_of(given)
    if chunk:
        use_blockwise(model, chunk)
    rows: list[int] = []
    for name, module in model.named_modules():
        if name.endswith(".mlp") and type(module) is MLP:
            # The first product gives the tokens of all tensor ranks.
            module.linear_fc1.register_forward_hook(lambda *call: rows.append(len(call[2][0])))
    torch.manual_seed(5)
    with remembering(), OnCpu():
        loss = forward(model, ring, 1)
        loss.backward()
    return {"loss": loss.detach(), **grads(model)}, rows


@pytest.mark.parametrize("chunk", [1, 7, 8, 100])
@pytest.mark.parametrize(
    ("size", "given", "dense"),
    [
        (2, case(ring=2), 2),
        (2, case(ring=2, config=GATED), 2),
        (2, case(ring=2, config={**FUSED, "hidden_dropout": 0.2}), 2),
        (4, case(tensor=2, ring=2, config={"sequence_parallel": True}), 2),
        (4, case(tensor=2, ring=2, layout="striped"), 2),
        (1, case(config=MIXED), 1),
        (1, case(config=FULL), 2),
    ],
    ids=str,
)
def test_chunks_are_the_whole(
    world: Callable[[int], World], size: int, given: Case, dense: int, chunk: int
) -> None:
    whole = world(size).run(stepped, given, None)
    pieces = world(size).run(stepped, given, chunk)
    local = SEQ_LEN // given.ring
    split = given.tensor if "sequence_parallel" in dict(given.config) else 1
    at_once = -(-chunk // split) * split
    again = 3 if "recompute_method" in dict(given.config) else 2
    for (wanted, once), (got, rows) in zip(whole, pieces, strict=True):
        assert max(relative(got[name], grad) for name, grad in wanted.items()) < 1e-12
        assert max(once) == local and max(rows) == min(at_once, local)
        assert sum(rows) == again * dense * local, "and again in backward"


def test_the_extra_layers_of_multi_token_prediction_too(world: Callable[[int], World]) -> None:
    given = case(ring=2, config=MTP)
    pairs = zip(*(world(2).run(stepped, given, chunk) for chunk in (None, 7)), strict=True)
    for (wanted, _), (got, rows) in pairs:
        assert max(relative(got[name], grad) for name, grad in wanted.items()) < 1e-6
        assert max(rows) == 7 and sum(rows) == 2 * (LAYERS + 1) * SEQ_LEN // 2


def accumulated(total: Tensor, grad: Tensor, main: Tensor) -> None:
    main += grad.t() @ total


def trained(options: Options, fused: bool) -> list[float]:
    """Training where weights' gradients are added to main_grad in the matrix product, as a CUDA
    extension does it.
    """
    kernel = SimpleNamespace(wgrad_gemm_accum_fp32=accumulated)
    asked = {**options.get("config", {}), "gradient_accumulation_fusion": fused}
    options = {**options, "config": asked}
    replaced: Any = {"fused_weight_gradient_mlp_cuda": kernel, "_grad_accum_fusion_available": True}
    with mock.patch.multiple(tensor_layers, create=True, **replaced) if fused else nullcontext():
        with OnCpu():
            chunks, optimizer, ring = build(options)
        return train(chunks, optimizer, ring)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, {"ring": 2, "sharded": True, "chunk": 5}),
        (2, {"ring": 2, "chunk": 5, "config": FULL}),
        (4, {"ring": 2, "tensor": 2, "sharded": True, "chunk": 5}),
        (4, {"ring": 2, "pipeline": 2, "virtual": 2, "chunk": 5}),
    ],
    ids=str,
)
def test_training_by_chunks_equals_one_rank(
    world: Callable[[int], World], size: int, options: Options, fused: bool
) -> None:
    (wanted,) = world(1).run(run, {})
    for told in world(size).run(trained, options, fused):
        assert told == pytest.approx(wanted, rel=2e-6)


def test_under_megatrons_own_fsdp(world: Callable[[int], World]) -> None:
    (wanted,) = world(1).run(run, {})
    plain = {"ring": 2, "chunk": 5, "config": {"gradient_accumulation_fusion": False}}
    for told in world(2).run(fsdp.sharded, plain, "optim_grads_params"):
        assert told == pytest.approx(wanted, rel=2e-6)


def overwriting() -> str:
    """What is said where Megatron-FSDP would overwrite what the chunks before gave."""
    model, ring = model_of(case(config={"gradient_accumulation_fusion": False}))
    use_blockwise(model, 8)
    model.config.gradient_accumulation_fusion = True
    next(model.decoder.layers[0].mlp.parameters()).__fsdp_param__ = True
    return raised(forward, model, ring, 1)


def refusals() -> dict[str, str]:
    """What is said of chunks that would not do what is asked."""
    model, _ = model_of(case())
    said = {"chunk": raised(use_blockwise, model, 0)}
    for name, value in (
        ("fp8", "hybrid"),
        ("tp_comm_overlap", True),
        ("delay_wgrad_compute", True),
        ("mlp_chunks_for_training", 4),
        ("cuda_graph_impl", "full_iteration"),
    ):
        with mock.patch.object(model.config, name, value, create=True):
            said[name] = raised(use_blockwise, model, 8)
    selective: Any = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    with mock.patch.multiple(model.config, **selective):
        said["mlp"] = raised(use_blockwise, model, 8)
    assert use_blockwise(model, 8) == LAYERS
    said["twice"] = raised(use_blockwise, model, 8)
    said["experts"] = raised(use_blockwise, model_of(case(config=MOE))[0], 8)
    other, _ = model_of(case())
    other.decoder.layers[1].mlp.__class__ = type("TEFusedMLP", (MLP,), {})
    said["another"] = raised(use_blockwise, other, 8)
    said["fsdp"] = overwriting()
    return said


def test_what_chunks_cannot_do_is_refused_by_name(world: Callable[[int], World]) -> None:
    messages = {
        "chunk": "at least 1; got 0",
        "fp8": "no fp8 or fp4",
        "tp_comm_overlap": "no tp_comm_overlap",
        "delay_wgrad_compute": "no delay_wgrad_compute",
        "mlp_chunks_for_training": "set it to 1",
        "cuda_graph_impl": "no CUDA graph of them",
        "mlp": "no mlp in recompute_modules",
        "twice": "call use_blockwise once",
        "experts": "no layer has a dense feed-forward",
        "another": "decoder.layers.1.mlp is a TEFusedMLP",
        "fsdp": "give --no-gradient-accumulation-fusion",
    }
    (said,) = world(1).run(refusals)
    assert said.keys() == messages.keys()
    for name, message in messages.items():
        assert message in said[name], (name, said[name])


def stages() -> list[str]:
    """What is said to a stage that has experts alone, of three models with dense layers in others
    and three without.
    """
    said = []
    for pattern in ([0, 1, 1], 2, "*E|*-", [1, 1], 1, "*E|*E"):
        model, _ = model_of(case(config=MOE))
        there: Any = {"pipeline_model_parallel_size": 2}
        if isinstance(pattern, str):
            model.hybrid_layer_pattern = pattern
        else:
            there["moe_layer_freq"] = pattern
        with mock.patch.multiple(model.config, **there):
            said.append(raised(use_blockwise, model, 8))
    return said


def test_a_stage_of_experts_follows_one_with_dense_layers(world: Callable[[int], World]) -> None:
    (said,) = world(1).run(stages)
    assert said[:3] == [""] * 3
    assert all("no layer has a dense feed-forward" in message for message in said[3:])


def by_the_flag(given: Case) -> list[bool]:
    """Which feed-forwards of an installed model go by chunks."""
    start(given)
    made = install(replace(given.options, ff_chunk=8))
    try:
        model = built(given)
    finally:
        made.remove()
    return ["forward" in vars(m) for n, m in model.named_modules() if n.endswith(".mlp")]


def test_the_option_reaches_every_dense_layer(world: Callable[[int], World]) -> None:
    assert world(1).run(by_the_flag, case()) == [[True] * LAYERS]
    assert world(1).run(by_the_flag, case(config=MIXED)) == [[True, False]]
    assert world(1).run(by_the_flag, case(config=MTP)) == [[True] * (LAYERS + 1)]
