"""The block of a DeepSpeed config that asks for a ring."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ring_sp.exchanges import EXCHANGES
from ring_sp.kernels import KERNELS
from ring_sp.layout import LAYOUTS

NAME = "sequence_parallel_ring"
"""Key of the block, at the top level of the config."""


@dataclass(frozen=True)
class RingBlock:
    """What the block asks for. `size` is the number of ranks that share a sequence: outer x ring x
    ulysses.
    """

    size: int
    layout: str = "zigzag"
    ulysses: int = 1
    outer: int = 1
    kernel: str = "auto"
    exchange: str = "messages"

    def __post_init__(self) -> None:
        """Raises ValueError for sizes that do not fit each other, or unknown names."""
        for key in ("size", "ulysses", "outer"):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{NAME}.{key} must be a whole number from 1 up; got {value!r}")
        if self.size % (self.ulysses * self.outer):
            raise ValueError(
                f"{NAME}: outer {self.outer} x ulysses {self.ulysses} must divide the size, "
                f"{self.size} ranks; choose sizes whose product divides it"
            )
        for key, known in (
            ("layout", LAYOUTS),
            ("kernel", ("auto", *KERNELS)),
            ("exchange", EXCHANGES),
        ):
            value = getattr(self, key)
            if value not in known:
                raise ValueError(f"{NAME}.{key} must be one of {', '.join(known)}; got {value!r}")

    @property
    def ring(self) -> int:
        """Stations of the inner ring."""
        return self.size // (self.outer * self.ulysses)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "RingBlock":
        """The block of a config. Raises ValueError where there is none, and for unknown keys."""
        if NAME not in config:
            raise ValueError(
                f'the DeepSpeed config has no block "{NAME}": add {{"{NAME}": {{"size": 2}}}}, '
                f"with size 1 for no ring, or call deepspeed.initialize"
            )
        given = config[NAME]
        known = [field.name for field in fields(cls)]
        if not isinstance(given, Mapping) or "size" not in given:
            raise ValueError(f'{NAME} must be a block with at least a "size"; got {given!r}')
        if unknown := sorted(map(str, given.keys() - set(known))):
            raise ValueError(f"{NAME} has {', '.join(known)}; got also {', '.join(unknown)}")
        return cls(**given)
