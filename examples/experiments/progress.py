"""How far the device is in a long step: the layers that it has come to."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from time import perf_counter
from typing import Any

import torch
from processes import say
from torch import nn

INTERVAL = 5.0
"""Seconds between two lines."""


@contextmanager
def progress(blocks: Iterable[nn.Module], device: torch.device, shown: bool) -> Iterator[None]:
    """Say every few seconds which layer's forward the device has begun, the first time, and in
    backward again if layers are checkpointed. Nothing is waited for: the host is far ahead.
    """
    if not shown or device.type != "cuda":
        yield
        return
    layers, passed, done = list(blocks), [], Event()

    def hook(*_: Any) -> None:
        passed.append(torch.cuda.Event())
        passed[-1].record()

    def watch() -> None:
        begin, told = perf_counter(), -1
        while not done.wait(INTERVAL):
            finished = told
            while finished + 1 < len(passed) and passed[finished + 1].query():
                finished += 1
            if finished > told:
                told = finished
                again, layer = divmod(told, len(layers))
                way = "backward" if again else "forward"
                say(f"  {way}, {layer + 1} of {len(layers)} layers, {perf_counter() - begin:.0f} s")

    # Before it: a recomputation ends inside of a layer.
    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        for handle in handles:
            handle.remove()
