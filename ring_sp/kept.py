"""Attention's results kept across recomputation, so that it does not go round the ring again.

A checkpoint (arXiv:1604.06174) runs a stretch of the forward twice; attention's part of it costs
more than all else, and its result is no larger than the stretch's input. Whoever runs the stretch
again, a host included, does it `recording` first and `replaying` after.
"""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

Result = tuple[Tensor, Tensor]
"""out and lse."""

_current: ContextVar["Kept | None"] = ContextVar("kept", default=None)


class Kept:
    """The (out, lse) of the calls of `ring_attention` in one stretch of a forward, in order.

    A stretch in another takes from the outer one what that replays. What torch.compile has traced
    is not seen: there a policy of selective checkpointing keeps `ring_sp::attention`.
    """

    def __init__(self) -> None:
        self._results: list[tuple[Hashable, Result]] = []
        self._turn: Iterator[tuple[Hashable, Result]] | None = None
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
    def _as_current(self, turn: Iterator[tuple[Hashable, Result]] | None) -> Iterator[None]:
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
        first, result = next(self._turn, (None, None))
        if result is None or first != call:
            raise RuntimeError(
                f"a recomputed stretch must make the calls of ring_attention that it made first; "
                f"first {first}, now {call}"
            )
        return result

    def put(self, call: Hashable, result: Result) -> None:
        """Keep the result of a call, unless it came from here."""
        if self._turn is None:
            self._results.append((call, result))
            if self._outer:
                self._outer.put(call, result)


def current() -> Kept | None:
    """What keeps, or has kept, the calls made now."""
    return _current.get()
