"""Rings under Megatron-FSDP, which shards weights and reduces gradients over data x ring ranks."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import World

pytest.importorskip("megatron")
import test_megatron_training as training
from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
from megatron_on_cpu import OnCpu, pretend_gpus_for_fsdp
from test_megatron_training import FULL, Options, build, run, train

SINKS = {"softmax_type": "learnable", "window_size": (9, 0)}
MEAN = {"calculate_per_token_loss": False}


def sharded(options: Options, strategy: str) -> list[float]:
    def wrapped(config: Any, setting: Any, model: Any) -> Any:
        pretend_gpus_for_fsdp()
        setting.use_megatron_fsdp = True
        setting.data_parallel_sharding_strategy = strategy
        setting.gradient_reduce_div_fusion = False  # gloo multiplies in no sum
        setting.overlap_grad_reduce = setting.overlap_param_gather = strategy.endswith("params")
        return FullyShardedDataParallel(config, setting, model, device=torch.device("cpu"))

    with mock.patch.object(training, "DistributedDataParallel", wrapped), OnCpu():
        chunks, optimizer, ring = build({**options, "sharded": True})
    return train(chunks, optimizer, ring)


@pytest.mark.parametrize("strategy", ["optim_grads_params", "optim_grads", "optim"])
def test_training_over_a_ring_equals_one_rank(world: Callable[[int], World], strategy: str) -> None:
    (wanted,) = world(1).run(run, {})
    for told in world(2).run(sharded, {"ring": 2}, strategy):
        assert told == pytest.approx(wanted, rel=2e-6)


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (4, {"ring": 4, "layout": "striped"}),
        (4, {"ring": 2, "config": SINKS}),
        (2, {"ring": 2, "config": FULL}),
        (4, {"ring": 2, "config": MEAN}),
    ],
    ids=str,
)
def test_equals_plain_data_parallelism(
    world: Callable[[int], World], size: int, options: Options
) -> None:
    """The same ring under Megatron's DDP, or one rank where the loss does not depend on it."""
    per_token = options.get("config") != MEAN
    alone = {"config": {} if options.get("config") == FULL else options.get("config", {})}
    (wanted, *_) = world(1).run(run, alone) if per_token else world(size).run(run, options)
    for told in world(size).run(sharded, options, "optim_grads_params"):
        assert told == pytest.approx(wanted, rel=5e-6)
