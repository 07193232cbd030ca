"""Bytes of tensors that are alive at once, counted where no allocator tells: on CPUs, and of fake
tensors, which have sizes and no content.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ring_sp.lanes import HostLane

Inside = Callable[..., int]


class Counted(TorchDispatchMode):
    """Counts the storages of all tensors that are made inside, until each is freed.

    What an operator of our own makes inside itself is not seen; `inside` gives the bytes of that,
    by the operator's name and from its arguments.
    """

    def __init__(self, inside: dict[str, Inside] | None = None) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._inside = inside or {}
        self._paused = False
        self._seen: dict[int, ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._paused:
            return result
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.add(x)
        within = self._inside.get(func.name())
        if within is not None:
            self.peak = max(self.peak, self.now + within(*args))
        return result

    def add(self, x: Tensor) -> Tensor:
        """Count a tensor from now on, if it is not counted already."""
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen and x.device.type != "meta":
            self.now += size
            self.peak = max(self.peak, self.now)
            self._seen[key] = ref(storage, lambda _: self._drop(key, size))
        return x

    def leave_out(self, x: Tensor) -> Tensor:
        """Never count a tensor that is not counted yet, nor views of it."""
        storage = x.untyped_storage()
        key = storage._cdata
        self._seen[key] = ref(storage, lambda _: self._drop(key, 0))
        return x

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is made inside is not counted; what is counted already goes on to be."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def reset_peak(self) -> None:
        self.peak = self.now

    def _drop(self, key: int, size: int) -> None:
        del self._seen[key]
        self.now -= size


class HostMemory(HostLane):
    """Where offloaded tensors go if device and host are the same memory: it is not counted."""

    def __init__(self, counted: Counted) -> None:
        self._counted = counted

    def host(self, num_bytes: int) -> Tensor:
        with self._counted.paused():
            buffer = super().host(num_bytes)
        return self._counted.leave_out(buffer)
