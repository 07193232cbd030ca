"""The names of ways to move tensors between the stations of a ring."""

from collections.abc import Iterator
from dataclasses import dataclass

from ring_sp.gather import default_sources


@dataclass(frozen=True)
class Exchanges:
    """Names, and with them "gather:N" for any number N of sources from 1 up."""

    names: tuple[str, ...] = ("messages", "copies", "gather")

    def __iter__(self) -> Iterator[str]:
        return iter((*self.names, "gather:N"))

    def __len__(self) -> int:
        return len(self.names) + 1

    def __contains__(self, exchange: object) -> bool:
        name, _, number = str(exchange).partition(":")
        numbered = name == "gather" and number.isdecimal() and int(number) > 0
        return exchange in self.names or numbered


EXCHANGES = Exchanges()
"""See `ProcessGroupManager.build`."""


def check_exchange(exchange: str, outer: int, ring: int) -> None:
    """Raise ValueError for an unknown exchange, NotImplementedError for one that these rings cannot
    have.
    """
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange must be one of {', '.join(EXCHANGES)}; got {exchange!r}")
    if exchange.startswith("gather"):
        refuse_nested(outer, ring)


def refuse_nested(outer: int, ring: int) -> None:
    """Raise NotImplementedError if sources of a ring of rings were to be gathered."""
    if min(outer, ring) > 1:
        raise NotImplementedError(
            f"exchange='gather' is for one ring; got outer {outer} x ring {ring}. Use outer=1, or "
            f"exchange='messages' for a ring of rings over slow links."
        )


def gathered(exchange: str, stations: int) -> int | None:
    """Sources that an exchange shows at a time to each of some stations, at most all; None where it
    is a ring.
    """
    name, _, number = exchange.partition(":")
    if name != "gather" or stations == 1:
        return None
    return min(int(number or default_sources(stations)), stations - 1)
