"""Ranks for the tests: processes that speak gloo, spawned once a module for each world size."""

import faulthandler
import multiprocessing
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from typing import Any

import pytest


class World:
    """`size` processes with torch.distributed: over gloo, or with a GPU each over NCCL or over what
    torch chooses where no backend is named.
    """

    def __init__(self, size: int, backend: str = "gloo") -> None:
        import torch.distributed as dist

        # A fork of a process that has touched CUDA cannot use it.
        context: SpawnContext | ForkServerContext = (
            multiprocessing.get_context("spawn")
            if backend != "gloo"
            else multiprocessing.get_context("forkserver")
        )
        # What takes seconds to import; models and DeepSpeed only where a collected test has them.
        models = ("gemma2", "gpt_oss", "llama", "mistral", "qwen3")
        modules = {f"transformers.models.{name}.modeling_{name}" for name in models}
        modules.add("ring_sp.integrations.deepspeed")
        hosts = ["ring_sp.integrations.megatron.installation", *(modules & sys.modules.keys())]
        context.set_forkserver_preload(hosts)
        # Where the ranks meet: here, as a port that is free now may not be once a rank listens.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._pipes: list[Connection] = []
        self._ranks = []
        self.closed = False
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(backend, rank, size, self._store.port, theirs), daemon=True
            )
            process.start()
            self._pipes.append(ours)
            self._ranks.append(process)

    def run(self, function: Callable[..., Any], *args: object, timeout: float = 300) -> list[Any]:
        """What `function(*args)` returns on each rank; an error on any fails the test that
        called.
        """
        call = pickle.dumps((function, args))
        for pipe in self._pipes:
            pipe.send_bytes(call)
        results: list[Any] = []
        errors: list[str] = []
        for rank, pipe in enumerate(self._pipes):
            if pipe not in wait([pipe, *(process.sentinel for process in self._ranks)], timeout):
                codes = [process.exitcode for process in self._ranks]
                self.close()
                said = f"rank {rank} gave no answer in {timeout} s, or one died; exit codes {codes}"
                pytest.fail(said + "".join(errors))
            result, error = pipe.recv()
            results.append(result)
            if error:
                errors.append(f"\nrank {rank}:\n{error}")
        if errors:
            self.close()
            pytest.fail("".join(errors))
        return results

    def close(self) -> None:
        """Ranks that failed may have left the others in the middle of a collective."""
        self.closed = True
        for process in self._ranks:
            process.kill()


def _serve(backend: str, rank: int, size: int, port: int, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    faulthandler.enable()
    torch.set_num_threads(1)
    if backend != "gloo":
        torch.cuda.set_device(rank)
        torch.set_default_device(f"cuda:{rank}")
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(backend or None, store=store, rank=rank, world_size=size)
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            pipe.send((function(*args), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Two threads take many times as long over shapes as small as these."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def world() -> Iterator[Callable[[int], World]]:
    """world(4).run(function, ...) calls a module-level function on 4 ranks.

    A module's own: each gloo group keeps a thread that polls, and those of many modules together
    would take all of the machine's time.
    """
    worlds: dict[int, World] = {}

    def of(size: int) -> World:
        if size not in worlds or worlds[size].closed:
            worlds[size] = World(size)
        return worlds[size]

    yield of
    for started in worlds.values():
        started.close()


@pytest.fixture(scope="module", params=["nccl", ""])
def gpu_world(request: pytest.FixtureRequest) -> Iterator[World]:
    """A rank on each GPU of this machine."""
    import torch

    started = World(torch.cuda.device_count(), request.param)
    yield started
    started.close()
