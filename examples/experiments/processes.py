"""The ranks that torchrun started, or this process alone."""

import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ring_sp.installed import version

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


def machine(device: torch.device) -> dict[str, str]:
    """What a run was made with: device, versions, command, without the folders of files."""
    on_gpu = device.type == "cuda"
    given = [Path(each).name if Path(each).is_absolute() else each for each in sys.argv]
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "CPU",
        "command": shlex.join([Path(given[0]).name, *given[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton", "triton") or "none",
        "flash-attn-4": version("flash_attn", "flash-attn-4") or "none",
    }
