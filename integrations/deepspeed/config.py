"""A DeepSpeed config as its user wrote it, and as DeepSpeed is to read it."""

from collections.abc import Mapping
from typing import Any

from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config

from ring_sp.integrations.deepspeed.block import RingBlock

TRAIN, MICRO, ACCUMULATION = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
)
REDUCTION = "communication_data_type"


def read(args: Any, config: Any, config_params: Any = None) -> dict[str, Any]:
    """The config from one of the places where `deepspeed.initialize` takes it: a dict, a path to
    JSON or base64. Raises ValueError for none or several, and for what cannot be read.
    """
    given = {
        "config": config,
        "config_params": config_params,
        "args.deepspeed_config": getattr(args, "deepspeed_config", None),
    }
    found = [name for name, value in given.items() if value is not None]
    if len(found) != 1:
        raise ValueError(
            f"DeepSpeed's config comes as one of {', '.join(given)}; got {found or 'none'}"
        )
    loaded: dict[str, Any] = load_ds_config(given[found[0]])
    return loaded


def translated(config: Mapping[str, Any], block: RingBlock, world_size: int) -> dict[str, Any]:
    """The config for DeepSpeed, in whose eyes the ranks of a ring are data ranks.

    Batch sizes keep what they say in the user's config, where they count sequences: a ring, not a
    rank, takes `train_micro_batch_size_per_gpu` of them. `sequence_parallel_size` tells DeepSpeed's
    arithmetic so; without an mpu it has no other effect. Gradients are reduced in fp32, unless
    `communication_data_type` says otherwise. Raises ValueError for batch sizes that do not fit.
    """
    made = {**config, **batch_sizes(config, world_size // block.size)}
    made.setdefault(REDUCTION, "fp32")
    if block.size > 1:
        made["sequence_parallel_size"] = block.size
    return made


def batch_sizes(config: Mapping[str, Any], data_size: int) -> dict[str, int]:
    """All three batch sizes, from those that are given: train = micro x accumulation x data ranks.

    Raises ValueError where they contradict each other, or do not say enough.
    """
    given = {key: config[key] for key in (TRAIN, MICRO, ACCUMULATION) if config.get(key)}
    for key, value in given.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{key} must be a whole number from 1 up; got {value!r}")
    train, micro, steps = (given.get(key) for key in (TRAIN, MICRO, ACCUMULATION))
    if train is None and micro is None:
        raise ValueError(f"the DeepSpeed config needs {TRAIN} or {MICRO}, in sequences")
    if micro is None:
        assert train is not None
        steps = steps or 1
        micro = train // (steps * data_size)
    elif steps is None:
        steps = 1 if train is None else train // (micro * data_size)
    whole = micro * steps * data_size
    if not whole or train not in (None, whole):
        raise ValueError(
            f"{TRAIN} counts sequences, and must be {MICRO} x {ACCUMULATION} x {data_size}, the "
            f"rings of this world; got {given}. Set one of them anew or leave it out."
        )
    return {TRAIN: whole, MICRO: micro, ACCUMULATION: steps}
