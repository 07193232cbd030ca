"""`deepspeed.initialize`, with a ring."""

import copy
from collections.abc import Callable
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.utils.data import DistributedSampler, IterableDataset

from ring_sp import ProcessGroupManager
from ring_sp.agreement import Refusal, refusal
from ring_sp.integrations.deepspeed.block import NAME, RingBlock
from ring_sp.integrations.deepspeed.config import read, translated
from ring_sp.integrations.deepspeed.hosted import check_model, switch
from ring_sp.integrations.deepspeed.refusals import refuse_arguments, refuse_config
from ring_sp.integrations.deepspeed.ring import DeepSpeedRing

AXES = ("outer", "ring", "ulysses")


def initialize(
    args: Any = None,
    model: Any = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[..., Any] | None = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
    manager: ProcessGroupManager | None = None,
) -> tuple[Any, Any, Any, Any]:
    """An engine whose sequences are spread over rings: takes and returns what
    `deepspeed.initialize` does, and reads the block "sequence_parallel_ring" of the config.

    The engine's attribute `ring` is a `DeepSpeedRing`: it cuts batches, and its losses have exact
    gradients in every ZeRO stage. A model of transformers has its attention switched, in place;
    another must call `ring_attention` with the sequence it is given. `manager` is for groups that
    are there already, such as `engine.ring.manager` of an earlier engine.

    Batch sizes in the config count sequences: train_batch_size = train_micro_batch_size_per_gpu x
    gradient_accumulation_steps x rings, where a ring takes a micro-batch together. `training_data`
    is sampled so that all ranks of a ring get the same. Gradients are reduced in fp32 unless the
    config has "communication_data_type", since sums over sequence ranks in bf16 lose bits;
    torch_autocast reduces in its own dtypes. Under `zero.Init(config_dict_or_path=...)` give
    `host_config(config)`, and here the config as you wrote it.

    Collective over the world. Raises ValueError or NotImplementedError, on every rank and before
    anything is built, for a block that is missing or wrong, sizes that do not divide, an mpu or
    mesh_param besides, models that cannot ring, and parts of DeepSpeed that do not go with it.
    """
    _start(distributed_port, dist_init_required)

    def check() -> tuple[RingBlock, dict[str, Any]]:
        refuse_arguments(model, mpu, mesh_param)
        found = _checked(read(args, config, config_params))
        _check_manager(manager, found[0])
        check_model(model, found[0])
        _check_data(training_data)
        return found

    block, made = _on_all_ranks(check)
    if manager is None:
        sizes = {name: getattr(block, name) for name in AXES}
        manager = ProcessGroupManager.build(**sizes, exchange=block.exchange)
    switch(model)
    own = _without_config(args)
    engine, *_ = deepspeed.initialize(
        args=own,
        model=model,
        optimizer=optimizer,
        model_parameters=model_parameters,
        lr_scheduler=lr_scheduler,
        distributed_port=distributed_port,
        dist_init_required=dist_init_required,
        collate_fn=collate_fn,
        config=made,
    )
    if hasattr(args, "local_rank"):
        args.local_rank = own.local_rank  # as DeepSpeed leaves it
    engine.ring = DeepSpeedRing.of(engine, manager, block)
    if training_data is not None:
        sampler: DistributedSampler[Any] = DistributedSampler(
            training_data, manager.size("data"), manager.rank("data")
        )
        engine.training_dataloader = engine.deepspeed_io(training_data, data_sampler=sampler)
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def host_config(config: Any) -> dict[str, Any]:
    """The config as `initialize` gives it to DeepSpeed, for `zero.Init` and transformers'
    HfDeepSpeedConfig, whose batch sizes would else count ranks of a ring as data ranks.

    `config` is a dict or a path to JSON. Collective over the world, and raises, as `initialize`.
    """
    _start()
    return _on_all_ranks(lambda: _checked(read(None, config)))[1]


def _start(port: int = 29500, required: bool | None = None) -> None:
    """torch.distributed as DeepSpeed starts it, with this process's device chosen: objects are
    gathered over NCCL before the engine chooses it.
    """
    backend = get_accelerator().communication_backend_name()
    deepspeed.init_distributed(backend, distributed_port=port, dist_init_required=required)
    if (local_rank := dist.get_node_local_rank(-1)) >= 0:
        get_accelerator().set_device(local_rank)


def _on_all_ranks(
    check: Callable[[], tuple[RingBlock, dict[str, Any]]],
) -> tuple[RingBlock, dict[str, Any]]:
    """What the check finds. Raises on all ranks if it raises on one, or finds other blocks or
    batch sizes elsewhere.
    """
    found: list[tuple[RingBlock, dict[str, Any]]] = []
    error = refusal(lambda: found.append(check()))
    terms = repr(found[0][1]) if found else ""
    reports: list[tuple[str, Refusal | None]] = [(terms, error)] * dist.get_world_size()
    dist.all_gather_object(reports, (terms, error))
    if error is not None:
        raise error
    for rank, (others, refused) in enumerate(reports):
        if refused is not None:
            raise type(refused)(f"rank {rank} refused its call: {refused}")
        if others != terms:
            raise ValueError(
                f"all ranks need the same DeepSpeed config; rank {rank} has {others}, this one "
                f"{terms}"
            )
    return found[0]


def _checked(config: dict[str, Any]) -> tuple[RingBlock, dict[str, Any]]:
    block = RingBlock.from_config(config)
    refuse_config(config, block, dist.get_world_size())
    return block, translated(config, block, dist.get_world_size())


def _check_manager(manager: ProcessGroupManager | None, block: RingBlock) -> None:
    if manager is None:
        return
    sizes = {name: manager.size(name) for name in AXES}
    wanted = {name: getattr(block, name) for name in AXES}
    if sizes != wanted or manager.size("data_sequence") != dist.get_world_size():
        raise ValueError(f"manager has {sizes} and {NAME} asks for {wanted}, without other axes")


def _check_data(training_data: Any) -> None:
    sized = hasattr(training_data, "__getitem__") and hasattr(training_data, "__len__")
    if training_data is None or (sized and not isinstance(training_data, IterableDataset)):
        return
    raise NotImplementedError(
        "training_data must have __getitem__ and __len__, so that all ranks of a ring draw the "
        "same samples; read an iterable dataset in a loader of your own, by "
        "engine.ring.manager.rank('data')"
    )


def _without_config(args: Any) -> Any:
    """A copy of the arguments that names no config: DeepSpeed takes one of two."""
    if getattr(args, "deepspeed_config", None) is None:
        return args
    own = copy.copy(args)
    own.deepspeed_config = None
    return own
