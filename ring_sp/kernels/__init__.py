"""Attention kernels behind one contract: a module for each, chosen by name or by what it can do."""

from ring_sp.kernels import cudnn, flash, flash4, reference, triton
from ring_sp.kernels.contract import Call, Kernel, Step

__all__ = ["KERNELS", "Call", "Kernel", "Step", "select"]

KERNELS: dict[str, Kernel] = {
    "flash4": flash4,
    "cudnn": cudnn,
    "triton": triton,
    "flash": flash,
    "reference": reference,
}
"""By name, in the order in which "auto" tries them."""


def select(name: str, call: Call) -> Kernel:
    """The kernel called `name`, or for "auto" the first one that can serve the call.

    Raises ValueError for an unknown name, and for a kernel that cannot serve the call, with its
    reason.
    """
    if name != "auto" and (not isinstance(name, str) or name not in KERNELS):
        raise ValueError(f"kernel must be one of auto, {', '.join(KERNELS)}; got {name!r}")
    refusals = []
    for candidate in KERNELS if name == "auto" else [name]:
        reason = KERNELS[candidate].refusal(call)
        if reason is None:
            return KERNELS[candidate]
        refusals.append(f"{candidate}: {reason}")
    raise ValueError(f"no kernel for {call}: {'; '.join(refusals)}")
