"""Whether Triton is here, and new enough."""

from functools import cache
from importlib.util import find_spec

MIN_TRITON = (3, 6)


@cache
def missing() -> str | None:
    """Why Triton cannot be used; None if it can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    from triton import __version__ as found

    if tuple(map(int, found.split(".")[:2])) < MIN_TRITON:
        return f"it needs triton {'.'.join(map(str, MIN_TRITON))} or later, not {found}"
    return None
