"""Attention's results kept across recomputation, so that it does not go round the ring again.

A checkpoint (arXiv:1604.06174) runs a stretch of the forward twice; attention's part of it costs
more than all else, and its result is no larger than the stretch's input. Whoever runs the stretch
again, a host included, does it `recording` first and `replaying` after.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

Result = tuple[Tensor, Tensor]
"""out and lse."""

Hold = Callable[[Tensor], Callable[[], Tensor]]
"""Keeps a tensor, and gives what gives it back, any number of times."""


def hold(tensor: Tensor) -> Callable[[], Tensor]:
    """Keep a tensor where it is. Raises RuntimeError if it has changed when it is given back."""
    version = tensor._version

    def give() -> Tensor:
        refuse_changed(tensor, version)
        return tensor

    return give


def refuse_changed(kept: Tensor, version: int) -> None:
    """Raise RuntimeError for a tensor that was changed in place since it had that version."""
    if kept._version != version:
        raise RuntimeError("what a checkpoint keeps was changed in place since it was kept")


_current: ContextVar["Kept | None"] = ContextVar("kept", default=None)


_Call = tuple[Hashable, tuple[Callable[[], Tensor], Callable[[], Tensor]]]


class Kept:
    """The (out, lse) of the calls of `ring_attention` in one stretch of a forward, in order.

    A stretch in another takes from the outer one what that replays. What torch.compile has traced
    is not seen: there a policy of selective checkpointing keeps `ring_sp::attention`.
    """

    def __init__(self, hold: Hold = hold) -> None:
        self._hold = hold
        self._results: list[_Call] = []
        self._turn: Iterator[_Call] | None = None
        self._outer: Kept | None = None
        self.recorded = False
        """Whether the stretch has run once."""

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the results of the calls made inside, in place of any kept before."""
        self._results, self.recorded = [], True
        with self._as_current(None):
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Give the calls made inside what was kept. They may stop early, and may come again."""
        with self._as_current(iter(self._results)):
            yield

    @contextmanager
    def _as_current(self, turn: Iterator[_Call] | None) -> Iterator[None]:
        self._turn, self._outer = turn, _current.get()
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)
            self._turn = self._outer = None

    def take(self, call: Hashable) -> Result | None:
        """The kept result of the next call; None if it is to be computed. Raises RuntimeError if
        the stretch does not call now what it called first.
        """
        if self._turn is None:
            return self._outer.take(call) if self._outer else None
        first, gives = next(self._turn, (None, None))
        if gives is None or first != call:
            raise RuntimeError(
                f"a recomputed stretch must make the calls of ring_attention that it made first; "
                f"first {first}, now {call}"
            )
        out, lse = gives
        return out(), lse()

    def put(self, call: Hashable, result: Result) -> None:
        """Keep the result of a call, unless it came from here."""
        if self._turn is None:
            out, lse = result
            self._results.append((call, (self._hold(out), self._hold(lse))))
            if self._outer:
                self._outer.put(call, result)


def current() -> Kept | None:
    """What keeps, or has kept, the calls made now."""
    return _current.get()
