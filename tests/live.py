"""Bytes of the tensors that are alive, counted on the CPU."""

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make inside, and the most bytes that were alive at once.
    What an operator uses itself, such as a kernel of attention, is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._given: dict[int, tuple[StorageWeakRef, int]] = {}
        """Made outside. Weak references keep an address from being given to another storage."""
        self.peak = self._most = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = _storages((args, kwargs))
        self._given |= {key: x for key, x in given.items() if key not in self._alive}
        found = func(*args, **(kwargs or {}))
        for key, made in _storages(found).items():
            if key not in self._given and key not in self._alive:
                self._alive[key] = made
                self._most += made[1]
        if self._most > self.peak:  # Some may be gone: to look takes long.
            self._most = self.now
            self.peak = max(self.peak, self._most)
        return found

    @property
    def now(self) -> int:
        """Bytes alive."""
        self._alive = {key: x for key, x in self._alive.items() if not x[0].expired()}
        return sum(size for _, size in self._alive.values())


def _storages(tree: Any) -> dict[int, tuple[StorageWeakRef, int]]:
    tensors = (x for x in tree_leaves(tree) if isinstance(x, Tensor) and not x.is_meta)
    found = (x.untyped_storage() for x in tensors)
    return {storage._cdata: (StorageWeakRef(storage), storage.nbytes()) for storage in found}
