"""What of DeepSpeed does not go with a ring, said before anything is built."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.utils import groups
from torch import nn

from ring_sp.integrations.deepspeed.block import NAME, RingBlock

RIVALS = ("sequence_parallel_size", "data_parallel_size")
"""Keys of DeepSpeed's own sequence parallelism."""


def refuse_config(config: Mapping[str, Any], block: RingBlock, world_size: int) -> None:
    """Raise ValueError or NotImplementedError for settings that contradict the block, or of which
    DeepSpeed makes wrong gradients.
    """
    if world_size % block.size:
        raise ValueError(
            f"{NAME}.size {block.size} does not divide the {world_size} ranks of the world: start "
            f"a multiple of {block.size} or choose another size"
        )
    if rivals := [key for key in RIVALS if key in config]:
        raise ValueError(
            f"leave out {' and '.join(rivals)}: {NAME} says how many ranks share a sequence, and "
            f"what is left of the world is data parallel. (With both of them DeepSpeed 0.19 does "
            f"not reduce gradients over sequence ranks.)"
        )
    if found := list(_of_config(config)):
        raise NotImplementedError(f"with {NAME}, {'; '.join(found)}")


def refuse_arguments(model: Any, mpu: Any, mesh_param: Any) -> None:
    """Raise ValueError for arguments of `deepspeed.initialize` that make groups of their own, and
    NotImplementedError for pipelines.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if mpu is not None or mesh_param is not None:
        name = "mpu" if mpu is not None else "mesh_param"
        raise ValueError(
            f"{name} and {NAME} both say which ranks share a sequence: leave out {name}; or leave "
            f"out the block and call deepspeed.initialize(mpu=RingMPU(manager))"
        )
    if isinstance(model, PipelineModule):
        raise NotImplementedError(f"{NAME} has no pipelines; got a {type(model).__name__}")
    for name in ("mpu", "mesh_device"):
        if getattr(groups, name) is not None:
            raise ValueError(
                f"deepspeed.utils.groups.{name} is left from another engine of this process, and "
                f"DeepSpeed would follow it: use a new process, or set it to None after destroying "
                f"that engine"
            )
    _require_world_partitions(model)


def _require_world_partitions(model: nn.Module) -> None:
    """Of a model built under zero.Init."""
    for name, weight in model.named_parameters():
        group = getattr(weight, "ds_process_group", None)
        if group is not None and dist.get_world_size(group) != dist.get_world_size():
            raise ValueError(
                f"zero.Init partitioned {name} over {dist.get_world_size(group)} ranks, and ZeRO-3 "
                f"will reduce over all {dist.get_world_size()}: call zero.Init without mpu and "
                f"data_parallel_group"
            )


def _of_config(config: Mapping[str, Any]) -> Iterator[str]:
    zero, tensor = _block(config, "zero_optimization"), _block(config, "tensor_parallel")
    if config.get("gradient_allreduce_op", "mean") != "mean":
        yield "gradient_allreduce_op must be mean, to which the loss is scaled"
    if zero.get("stage") == 3 and config.get("gradient_predivide_factor", 1) != 1:
        yield (
            "gradient_predivide_factor must be left out in ZeRO stage 3, where DeepSpeed 0.19 does "
            "not undo it if it is the number of ranks, and refuses it with reduce_scatter"
        )
    if (tensor.get("autotp_size") or 0) > 1:
        yield "tensor_parallel (AutoTP) is not supported: DeepSpeed puts its groups over the ring's"
    if zero.get("zenflow") is not None:
        yield "zero_optimization.zenflow is not tested; leave it out"
    for key, name, why in (
        ("compile", "deepcompile", "moves collectives between those of the ring"),
        ("hybrid_engine", "enabled", "replaces the attention"),
        ("expert_parallel", "enabled", "makes groups of its own (AutoEP)"),
        ("data_efficiency", "enabled", "cuts sequences after they are sharded"),
    ):
        if _block(config, key).get(name):
            yield f"{key}.{name} is not supported: it {why}"


def _block(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = config.get(key)
    return found if isinstance(found, Mapping) else {}
