"""Save and resume: a file for each tensor-parallel rank, the same for every ring and data size."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn
from torch.optim import Optimizer

LATEST = "latest.txt"


def save(
    folder: Path, step: int, model: nn.Module, optimizer: Optimizer, arguments: dict[str, Any]
) -> None:
    """Write what `load` needs to go on after `step` steps. Collective over the world."""
    target = folder / f"step_{step:07d}"
    if parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0:
        target.mkdir(parents=True, exist_ok=True)
        size = parallel_state.get_tensor_model_parallel_world_size()
        state = {
            "step": step,
            "arguments": arguments,
            "tensor_model_parallel_size": size,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        torch.save(state, target / _file())
    dist.barrier()
    if dist.get_rank() == 0:
        # The pointer moves last, so that an interrupted save leaves the one before it in force.
        pointer = folder / (LATEST + ".new")
        pointer.write_text(target.name)
        pointer.replace(folder / LATEST)
    dist.barrier()


def load(folder: Path, model: nn.Module, optimizer: Optimizer, arguments: dict[str, Any]) -> int:
    """Restore the latest checkpoint in place; returns the steps done.

    Raises ValueError if there is none, or if it was saved with another tensor-parallel size or
    other `arguments`.
    """
    if not (folder / LATEST).exists():
        raise ValueError(f"no checkpoint in {folder}: {LATEST} is missing")
    target = folder / (folder / LATEST).read_text()
    size = parallel_state.get_tensor_model_parallel_world_size()
    path = target / _file()
    state = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {}
    if state.get("tensor_model_parallel_size") != size:
        raise ValueError(
            f"{target} was not saved with --tensor-model-parallel-size {size}. Resume with the "
            f"size it was saved with; ring and data sizes may differ."
        )
    saved = state.get("arguments", {})
    changed = [
        f"--{name.replace('_', '-')} {saved.get(name)}, not {value}"
        for name, value in arguments.items()
        if saved.get(name) != value
    ]
    if changed:
        raise ValueError(f"{target} was saved with {'; '.join(changed)}. Resume with the same.")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def _file() -> str:
    return f"tensor_{parallel_state.get_tensor_model_parallel_rank():02d}.pt"
