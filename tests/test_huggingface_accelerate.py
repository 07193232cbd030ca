"""A Trainer over a ring under accelerate's FSDP2, whole or within replicas, is the stock one."""

import tempfile
from collections.abc import Callable

import pytest
from conftest import World
from torch.distributed.tensor import DTensor

pytest.importorskip("accelerate")
from accelerate import ParallelismConfig
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from hf_training import Run, made, outcome, trained

from ring_sp.integrations.huggingface.trainer import RingTrainer


class Sharding(RingTrainer):
    """With what accelerate's state holds on GPUs; it offers FSDP on no CPU."""

    replicas = 0

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = True
        state = self.accelerator.state
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            cpu_ram_efficient_loading=False,
        )
        if self.replicas:
            sizes = {"dp_replicate_size": self.replicas, "dp_shard_size": 4 // self.replicas}
            state.parallelism_config = ParallelismConfig(**sizes)
            state.device_mesh = state.parallelism_config.build_device_mesh("cpu")


class Replicated(Sharding):
    replicas = 2


def logged(kind: type[RingTrainer], run: Run) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        found = outcome(made(run, folder, kind))
    assert isinstance(found.weights["model.layers.0.mlp.up_proj.weight"], DTensor)
    return found.history


@pytest.mark.parametrize("kind", [Sharding, Replicated])
def test_fsdp2_logs_the_loss_and_norm_of_one_process(
    world: Callable[[int], World], kind: type[RingTrainer]
) -> None:
    wanted = world(1).run(trained, Run(rows=8, accumulation=4, eval_batch=4))[0].history
    for history in world(4).run(logged, kind, Run(2, 8, accumulation=2)):
        assert len(history) == len(wanted) and "grad_norm" in history[0]
        for log, other in zip(history, wanted, strict=True):
            for name, value in other.items():
                assert abs(log[name] - value) <= 1e-5 * abs(value), (name, log, other)
