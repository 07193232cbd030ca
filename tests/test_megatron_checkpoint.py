"""Megatron's distributed checkpoints, saved over one ring and resumed over another."""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import World

pytest.importorskip("megatron")
from megatron.core import dist_checkpointing
from megatron.core import optimizer as optimizers
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import distrib_optimizer
from megatron_on_cpu import OnCpu
from test_megatron_training import Options, build, train

SINKS = {"softmax_type": "learnable"}


class FusedAdam(torch.optim.Optimizer):
    """In place of apex's, which counts steps by group: Megatron's distributed optimizer loads no
    other, but for Transformer Engine's, which does so too.
    """

    def __init__(self, params: Any, **given: Any) -> None:
        super().__init__(params, given)

    @torch.no_grad()
    def step(self, *_: object) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (first, second), lr = group["betas"], group["lr"]
            for weight in group["params"]:
                names = ("exp_avg", "exp_avg_sq")
                for name in names:
                    self.state[weight].setdefault(name, torch.zeros_like(weight))
                mean, square = (self.state[weight][name] for name in names)
                mean.lerp_(weight.grad, 1 - first)
                square.mul_(second).addcmul_(weight.grad, weight.grad, value=1 - second)
                scale = (square / (1 - second ** group["step"])).sqrt_().add_(group["eps"])
                weight.mul_(1 - lr * group["weight_decay"])
                weight.addcdiv_(mean, scale, value=-lr / (1 - first ** group["step"]))


@contextmanager
def apex() -> Iterator[None]:
    """As if apex were there, as far as the distributed optimizer asks."""
    there: Any = {"HAVE_APEX_OR_TE": True, "USING_APEX_OPTIMIZER": True, "Adam": FusedAdam}
    with (
        mock.patch.multiple(distrib_optimizer, **there),
        mock.patch.multiple(optimizers, USING_PYTORCH_OPTIMIZER=False, Adam=FusedAdam),
    ):
        yield


def state(model: Any, optimizer: Any, loading: bool) -> dict[str, Any]:
    """What Megatron's scripts save, but for the iteration and random numbers."""
    weights = model.module.sharded_state_dict()
    # Megatron takes the dictionary apart.
    again = model.module.sharded_state_dict()
    form = {}
    if optimizer.config.use_distributed_optimizer:
        form["metadata"] = {"distrib_optim_sharding_type": "fully_reshardable"}
    return {"model": weights, "optimizer": optimizer.sharded_state_dict(again, loading, **form)}


def trained(options: Options, source: Path | None, target: Path | None) -> list[float]:
    """Losses and norms of two steps, from the checkpoint in `source`, saved in `target`."""
    with apex() if options.get("sharded") else nullcontext():
        return resumed(options, source, target)


def resumed(options: Options, source: Path | None, target: Path | None) -> list[float]:
    with OnCpu():
        (model,), optimizer, ring = build(options)
        if source is not None:
            wanted = state(model, optimizer, True)
            found = dist_checkpointing.load(wanted, str(source))
            model.module.load_state_dict(found["model"])
            optimizer.load_state_dict(found["optimizer"])
    told = train([model], optimizer, ring)
    if target is not None:
        save(model, optimizer, target)
    return told


def save(model: Any, optimizer: Any, target: Path) -> None:
    """Megatron writes in processes of its own, which a rank of the tests may not have."""
    ours = multiprocessing.current_process()
    with OnCpu(), mock.patch.dict(vars(ours)["_config"], daemon=False):
        dist_checkpointing.save(state(model, optimizer, False), str(target))
    # The last of them serves this queue.
    filesystem_async._results_queue = None


@pytest.mark.parametrize(
    ("size", "options", "resumed_size", "resumed"),
    [
        (2, {"ring": 2}, 4, {"ring": 4, "layout": "striped"}),
        (4, {"ring": 2, "tensor": 2}, 2, {"ring": 2}),
        (1, {}, 4, {"ring": 2, "tensor": 2, "layout": "contiguous"}),
        (2, {"ring": 2, "sharded": True}, 4, {"ring": 4, "layout": "striped", "sharded": True}),
        (4, {"ring": 2, "tensor": 2, "sharded": True}, 2, {"ring": 2, "sharded": True}),
        (2, {"sharded": True}, 4, {"ring": 2, "sharded": True}),
    ],
    ids=str,
)
def test_a_run_goes_on_over_another_ring(
    world: Callable[[int], World],
    tmp_path: Path,
    size: int,
    options: Options,
    resumed_size: int,
    resumed: Options,
) -> None:
    first, alone = tmp_path / "ring", tmp_path / "alone"
    for folder in (first, alone):
        folder.mkdir()
    config = {"config": SINKS}
    before = world(1).run(trained, config, None, alone)[0]
    wanted = world(1).run(trained, config, alone, None)[0]
    assert wanted != pytest.approx(before, rel=1e-3), "the checkpoint says something"
    world(size).run(trained, {**options, **config}, None, first)
    for told in world(resumed_size).run(trained, {**resumed, **config}, first, None):
        assert told == pytest.approx(wanted, rel=1e-5)
