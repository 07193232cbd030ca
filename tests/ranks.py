"""What the tests run on every rank; a rank is one process of `conftest.World`."""

from functools import cache

import ring_sp
from ring_sp import ProcessGroupManager


@cache
def groups(
    tensor: int = 1,
    ring: int = 1,
    ulysses: int = 1,
    outer: int = 1,
    copies: int = 0,
    gather: int = 0,
) -> ProcessGroupManager:
    """The groups of this world with these sizes, built once a process."""
    exchange = f"gather:{gather}" if gather else "copies" if copies else "messages"
    return ProcessGroupManager.build(
        tensor=tensor, ring=ring, ulysses=ulysses, outer=outer, exchange=exchange
    )


def raised(function, *args, **kwargs) -> str:  # type: ignore[no-untyped-def]
    """The message of the ValueError or NotImplementedError of a call; "" if it raises none."""
    try:
        function(*args, **kwargs)
    except (ValueError, NotImplementedError) as error:
        return str(error)
    return ""


def sequence(sizes: dict[str, int], seq_len: int, **options: object) -> ring_sp.ShardedSequence:
    return ring_sp.ShardedSequence(seq_len, groups(**sizes).topology, **options)  # type: ignore[arg-type]
