"""One pass round the ring with a kernel: attention forward, and its gradients backward."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ring_sp.kernels import Kernel, Step
from ring_sp.kernels.contract import Rows, State, accumulation_dtype, empty_state
from ring_sp.ring import Message, ring_pass
from ring_sp.sequence import Plan


@dataclass(frozen=True)
class Setting:
    """All that a pass needs besides the tensors."""

    plan: Plan
    kernel: Kernel
    scale: float
    softcap: float | None

    def step(self, source: int) -> Step:
        plan = self.plan
        final, derived = source == plan.final, plan.derived[source]
        return Step(plan.tiles(source), self.scale, self.softcap, final, derived)


@dataclass(frozen=True)
class Wire:
    """K and V as one flat message: K [B, S, Hkv, D] dense, then V [B, S, Hkv, Dv] dense."""

    batch: int
    kv_heads: int
    head_dim: int
    v_head_dim: int

    @classmethod
    def of(cls, k: Tensor, v: Tensor) -> "Wire":
        return cls(k.shape[0], k.shape[2], k.shape[3], v.shape[3])

    def numel(self, kv_len: int) -> int:
        return self.batch * kv_len * self.kv_heads * (self.head_dim + self.v_head_dim)

    def join(self, k: Tensor, v: Tensor) -> Tensor:
        message = k.new_empty(self.numel(k.shape[1]))
        for part, x in zip(self.split(message), (k, v), strict=True):
            part.copy_(x)
        return message

    def split(self, message: Tensor) -> tuple[Tensor, Tensor]:
        """Views of K and V in a message."""
        kv_len = message.numel() // self.numel(1)
        k, v = message.split(
            [
                self.numel(kv_len) * dim // (self.head_dim + self.v_head_dim)
                for dim in (self.head_dim, self.v_head_dim)
            ]
        )
        shape = (self.batch, kv_len, self.kv_heads, -1)
        return k.view(shape), v.view(shape)


def attend(q: Tensor, kv: Tensor, wire: Wire, setting: Setting) -> State:
    """out [B, Sq, H, Dv] in q's dtype and lse [B, H, Sq], over the keys of all stations; `kv` is
    this station's.
    """
    plan, state = setting.plan, None

    def visit(seen: Tensor, source: int) -> None:
        nonlocal state
        keys, values = wire.split(seen)
        with torch.autocast(seen.device.type, enabled=False):
            state = setting.kernel.forward(q, keys, values, setting.step(source), state)

    message = Message(lambda source: wire.numel(plan.kv_len(source)), kv.dtype, kv.device)
    ring_pass(kv, plan.path, visit, message)
    out, lse = state or empty_state(q, wire.v_head_dim)
    return out.to(q.dtype), lse


def gradients(
    q: Tensor, kv: Tensor, wire: Wire, rows: Rows, setting: Setting
) -> tuple[Tensor, Tensor]:
    """dq like q, and dkv like kv: what the queries of all stations give to this station's keys."""
    plan, dtype = setting.plan, accumulation_dtype(q.dtype)
    travels = sums_dtype(q.dtype, plan.stations)
    own_dtype = q.dtype if plan.stations == 1 or setting.kernel.ROUNDS else dtype
    dq: Tensor | None = None
    kept: Tensor | None = None

    def visit(seen: Tensor, source: int) -> Tensor:
        nonlocal dq, kept
        own = source == plan.rank
        dkv = torch.empty_like(seen, dtype=own_dtype if own else travels)
        with torch.autocast(seen.device.type, enabled=False):
            dq = setting.kernel.backward(
                q, wire.split(seen), rows, setting.step(source), dq, wire.split(dkv)
            )
        kept = dkv if own else kept
        return dkv

    message = Message(lambda source: wire.numel(plan.kv_len(source)), kv.dtype, kv.device, travels)
    others = ring_pass(kv, plan.path, visit, message)
    return torch.zeros_like(q) if dq is None else dq, _sum(kv, kept, others)


def sums_dtype(dtype: torch.dtype, stations: int) -> torch.dtype:
    """In which dtype the gradients of keys and values travel, for q of `dtype`."""
    # Where only one other rank adds, its part is rounded but once.
    return accumulation_dtype(dtype) if stations > 2 else dtype


def _sum(like: Tensor, *parts: Tensor | None) -> Tensor:
    """The sum of the parts that exist, in the dtype of `like`."""
    one, *more = [part for part in parts if part is not None] or [torch.zeros_like(like)]
    return torch.add(one, *more, out=torch.empty_like(like)) if more else one.to(like.dtype)
