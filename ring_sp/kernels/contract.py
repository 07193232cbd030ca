"""What an attention kernel promises to the ring.

A kernel is called once for each step of the ring, with all tiles in which this station's queries
meet the keys at hand, and folds them into the running result. A backend is a module with the
functions of `Kernel`.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ring_sp.kernels.dropout import Dropout
from ring_sp.regions import Tile

State = tuple[Tensor, Tensor]
"""(out, lse): out [B, Sq, H, Dv] normalised over the keys seen so far, lse [B, H, Sq] natural log
in the accumulation dtype.

A row that has seen nothing is zero, with lse = -inf. Before the final step the dtype of out, and
that of a dq under way, are the kernel's own; both end in q's dtype.
"""


@dataclass(frozen=True)
class Call:
    """What decides whether a kernel can serve a call: the same on every rank.

    `windowed` if the mask hides keys on the left of a diagonal, too far back or not far enough
    ahead; `num_regions` counts the mask's documents and other regions; `lse_gradient` if lse may
    have a gradient; `deterministic` if two runs must give the same gradients, as in torch's
    deterministic mode.
    """

    device_type: str
    dtype: torch.dtype
    head_dim: int
    v_head_dim: int
    softcap: bool = False
    scale: float = 1.0
    windowed: bool = False
    num_regions: int = 1
    lse_gradient: bool = False
    dropout: bool = False
    deterministic: bool = False


@dataclass(frozen=True)
class Step:
    """The tiles of one step (never an empty row in one), the score: softcap * tanh(scale * q.k /
    softcap), and which weights of the values are dropped, though lse counts them.

    `final` marks the last step of a pass, whose out or dq is in q's dtype. `derived` belongs to the
    tiles and outlives the call: a kernel keeps there, under a key of its own, what it works out
    from them, such as tables on the device.
    """

    tiles: tuple[Tile, ...]
    scale: float
    softcap: float | None = None
    final: bool = True
    dropout: Dropout | None = field(default=None, compare=False)
    derived: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Rows:
    """What the backward of every step knows of the queries: out [B, Sq, H, Dv] over all keys of the
    sequence and its gradient dout, in q's dtype; lse [B, H, Sq] over all keys, in the accumulation
    dtype, and its gradient dlse, None where there is none. `derived` outlives a step, not a pass;
    where queries come from another rank it has their delta, and out is None.
    """

    out: Tensor | None
    lse: Tensor
    dout: Tensor
    dlse: Tensor | None = None
    derived: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)


class Kernel(Protocol):
    """q [B, Sq, H, D], k [B, Sk, Hkv, D], v [B, Sk, Hkv, Dv] and dout [B, Sq, H, Dv] of one dtype,
    dense in their last dimension, and where D and Dv are multiples of 16 bytes all of their rows
    start at such; H is a multiple of Hkv and head h reads key head h // (H // Hkv). A GPU they are
    on is the current one.
    """

    __name__: str
    ROUNDS: bool
    """Whether it rounds dk and dv to q's dtype by itself, so that wider buffers gain nothing."""
    NEEDS_OUT: bool
    """Whether its backward cannot do with delta instead of out."""

    def refusal(self, call: Call) -> str | None:
        """Why this kernel cannot serve a call; None if it can."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, step: Step, state: State | None) -> State:
        """Fold a step into the state, whose memory it may reuse; None starts one."""

    def backward(
        self,
        q: Tensor,
        kv: tuple[Tensor, Tensor],
        rows: Rows,
        step: Step,
        dq: Tensor | None,
        dkv: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Add to dq [B, Sq, H, D], whose memory it may reuse, and return the sum (None starts one);
        overwrite all of dk and dv, which have the accumulation dtype or q's.
        """


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for all else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def on_device(table: Tensor, device: torch.device) -> Tensor:
    """A table from the CPU, without waiting for what the device has to do, as the copy of pageable
    memory would.
    """
    if device.type == "cuda":
        table = table.pin_memory()
    return table.to(device, non_blocking=True)


def empty_state(q: Tensor, v_head_dim: int) -> State:
    """The state of queries that have seen nothing, out in q's dtype."""
    batch, rows, heads, _ = q.shape
    dtype = accumulation_dtype(q.dtype)
    return (
        q.new_zeros(batch, rows, heads, v_head_dim),
        q.new_full((batch, heads, rows), -torch.inf, dtype=dtype),
    )
