"""The ranks that a command of the command line runs on: torchrun's, or this process alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from socket import gethostname
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from ring_sp.topology import ProcessGroupManager, Topology

PATIENCE = timedelta(seconds=60)
"""After which a transfer that never ends is an error."""


@dataclass(frozen=True)
class Group:
    """One ring of all ranks, and where this one computes."""

    topology: Topology
    device: torch.device
    hosts: tuple[str, ...]
    """Of each rank."""

    @property
    def rank(self) -> int:
        return self.topology.rank

    @property
    def size(self) -> int:
        return self.topology.size

    def everywhere(self, value: object) -> list[Any]:
        """The values of all ranks, in order. Collective."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.topology.group)
        return values

    def seconds(self, step: Callable[[], object], repeats: int = 3) -> float:
        """Of a step on this rank: the least of some turns, after one to warm up. All ranks start
        together.
        """
        step()
        found = []
        for _ in range(repeats):
            self.synchronize()
            self.everywhere(None)
            begin = perf_counter()
            step()
            self.synchronize()
            found.append(perf_counter() - begin)
        return min(found)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextmanager
def alone_or_together(exchange: str = "messages") -> Iterator[Group]:
    """One ring of the ranks that torchrun started, over NCCL where there are GPUs and else gloo; or
    of this process. Collective. Raises ValueError for fewer GPUs than ranks of a host,
    NotImplementedError where copies cannot be.
    """
    started = dist.is_torchelastic_launched() and not dist.is_initialized()
    local = dist.get_node_local_rank() if started else 0
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"each rank needs a GPU; got {torch.cuda.device_count()} GPUs for local rank "
                f"{local}. Start torchrun with --nproc_per_node {torch.cuda.device_count()}."
            )
        torch.cuda.set_device(device)
    if started:
        on_gpu = device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", timeout=PATIENCE, device_id=device if on_gpu else None
        )
    try:
        size = dist.get_world_size() if dist.is_initialized() else 1
        groups = ProcessGroupManager.build(ring=size, device_type=device.type, exchange=exchange)
        hosts = [gethostname()]
        if size > 1:
            hosts *= size
            dist.all_gather_object(hosts, gethostname())
        yield Group(groups.topology, device, tuple(hosts))
    finally:
        if started:
            dist.destroy_process_group()
