"""Attention kernels behind one contract: a module for each, chosen by name or by what it can do."""

from ring_sp.kernels import cudnn, flash, flash4, reference, triton
from ring_sp.kernels.contract import Call, Kernel, Step

__all__ = ["KERNELS", "Call", "Kernel", "Step", "choose", "select"]

KERNELS: dict[str, Kernel] = {
    "flash4": flash4,
    "cudnn": cudnn,
    "triton": triton,
    "flash": flash,
    "reference": reference,
}
"""By name, in the order in which "auto" tries them."""


def choose(name: str, call: Call) -> tuple[str | None, dict[str, str]]:
    """The name of the kernel that serves a call, None if there is none, and the reason of each that
    refused before it. `name` is a kernel's, or "auto" for the first one that can serve the call.

    Raises ValueError for an unknown name.
    """
    if name != "auto" and (not isinstance(name, str) or name not in KERNELS):
        raise ValueError(f"kernel must be one of auto, {', '.join(KERNELS)}; got {name!r}")
    refused: dict[str, str] = {}
    for candidate in KERNELS if name == "auto" else [name]:
        reason = KERNELS[candidate].refusal(call)
        if reason is None:
            return candidate, refused
        refused[candidate] = reason
    return None, refused


def select(name: str, call: Call) -> Kernel:
    """The kernel that `choose` names.

    Raises ValueError for an unknown name, and for a kernel that cannot serve the call, with its
    reason.
    """
    chosen, refused = choose(name, call)
    if chosen is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise ValueError(f"no kernel for {call}: {reasons}")
    return KERNELS[chosen]
