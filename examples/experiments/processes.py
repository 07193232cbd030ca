"""The ranks that torchrun started, or this process alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = timedelta(minutes=20)
"""A step of a million tokens is enqueued as a whole: its last transfer ends minutes after."""


@contextmanager
def started() -> Iterator[torch.device]:
    """torch.distributed over NCCL or gloo, where torchrun started ranks; a GPU for each rank if
    there are any.
    """
    together = dist.is_torchelastic_launched()
    local = dist.get_node_local_rank() if together else 0
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    if together:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", timeout=PATIENCE, device_id=device if on_gpu else None
        )
    try:
        yield device
    finally:
        if together:
            dist.destroy_process_group()


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def everywhere(value: Any) -> list[Any]:
    """The values of all ranks. Collective."""
    values = [value] * ranks()
    if ranks() > 1:
        dist.all_gather_object(values, value)
    return values


def first() -> bool:
    """Whether this rank is the one that speaks and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def say(*words: object) -> None:
    """Print at once, on the first rank."""
    if first():
        print(*words, flush=True)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
