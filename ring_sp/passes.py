"""One pass round the ring with a kernel: attention forward, and its gradients backward."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ring_sp.kernels import Kernel, Step
from ring_sp.kernels.contract import Rows, State, accumulation_dtype, empty_state
from ring_sp.kernels.delta import delta
from ring_sp.kernels.dropout import Dropout
from ring_sp.plan import Plan
from ring_sp.ring import Message, Visit, ring_pass

Exchange = Callable[[Tensor, Visit, Message], Tensor | None]
"""What `Plan.show` does."""


class Drops(NamedTuple):
    """What of `kernels.dropout.Dropout` does not depend on the visit."""

    p: float
    seed: int
    first_head: int
    num_heads: int
    device: torch.device


@dataclass(frozen=True)
class Setting:
    """All that a pass needs besides the tensors."""

    plan: Plan
    kernel: Kernel
    scale: float
    softcap: float | None
    sums_dtype: torch.dtype | None = None
    """In which sums of gradients travel, if somebody asked."""
    drops: Drops | None = None
    exchange: Exchange | None = None
    """Another than the plan's: how to play ranks that are not there."""

    def step(self, number: int) -> Step:
        """That of a visit."""
        plan, drops = self.plan, self.drops
        final, derived = number == plan.final, plan.derived[number]
        dropout = None
        if drops is not None:
            places = plan.positions(number, drops.device)
            dropout = Dropout(drops.p, drops.seed, *places, drops.first_head, drops.num_heads)
        return Step(plan.tiles(number), self.scale, self.softcap, final, dropout, derived)

    def show(self, x: Tensor, visit: Visit, message: Message) -> Tensor | None:
        """See `Plan.show`."""
        return (self.exchange or self.plan.show)(x, visit, message)


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

    def blocks(self, message: Tensor) -> list[Tensor]:
        """Views of a message as [rows, S, elements], K's rows and then V's; one where they are
        alike.
        """
        kv_len, rows = message.numel() // self.numel(1), self.batch
        if self.head_dim == self.v_head_dim:
            return [message.view(2 * rows, kv_len, -1)]
        return [x.flatten(2) for x in self.split(message)]

    def message(self, kv: Tensor, plan: Plan, sums_dtype: torch.dtype | None = None) -> Message:
        """What a pass shows of keys and values."""

        def numel(source: int) -> int:
            return self.numel(plan.kv_lens[source])

        return Message(numel, kv.dtype, kv.device, sums_dtype, blocks=self.blocks)


@dataclass(frozen=True)
class QueryWire:
    """What a backward must know of queries as one message of bytes: lse and delta [B, H, S], then q
    [B, S, H, D] and dout [B, S, H, Dv], each dense from a multiple of 16 bytes on.
    """

    batch: int
    heads: int
    head_dim: int
    v_head_dim: int

    @classmethod
    def of(cls, q: Tensor, wire: Wire) -> "QueryWire":
        return cls(q.shape[0], q.shape[2], q.shape[3], wire.v_head_dim)

    def dq_numel(self, q_len: int) -> int:
        return self.batch * q_len * self.heads * self.head_dim

    def numel(self, q_len: int, itemsize: int) -> int:
        """Bytes of a message."""
        return sum(self._sizes(q_len, itemsize))

    def join(self, q: Tensor, rows: Rows) -> Tensor:
        message = torch.empty(
            self.numel(q.shape[1], q.dtype.itemsize), dtype=torch.uint8, device=q.device
        )
        into, their = self.split(message, q.shape[1], q.dtype)
        into.copy_(q)
        their.dout.copy_(rows.dout)
        their.lse.copy_(rows.lse)
        delta(their).copy_(delta(rows))
        return message

    def split(self, message: Tensor, q_len: int, dtype: torch.dtype) -> tuple[Tensor, Rows]:
        """Views of the queries in a message, and of what is known of them."""
        parts = message.split(self._sizes(q_len, dtype.itemsize))
        per_row, high = (self.batch, self.heads, q_len), accumulation_dtype(dtype)
        shapes = [per_row, per_row, *((self.batch, q_len, self.heads, dim) for dim in self._dims)]
        lse, subtracted, q, dout = (
            part.view(kind)[: prod(shape)].view(shape)
            for part, kind, shape in zip(parts, (high, high, dtype, dtype), shapes, strict=True)
        )
        return q, Rows(None, lse, dout, derived={"delta": subtracted})

    @property
    def _dims(self) -> tuple[int, int]:
        return self.head_dim, self.v_head_dim

    def _sizes(self, q_len: int, itemsize: int) -> list[int]:
        rows = self.batch * q_len * self.heads
        per_row = [max(itemsize, 4)] * 2 + [dim * itemsize for dim in self._dims]
        return [-(-rows * size // 16) * 16 for size in per_row]


def queries_travel(
    queries: QueryWire, keys: Wire, setting: Setting, itemsize: int, sums_itemsize: int
) -> bool:
    """Whether the backward moves fewer bytes if queries go round instead of keys: with as many key
    heads as query heads it does, with half as many it does not. Where sources are gathered they do
    not travel.
    """
    plan = setting.plan
    by_queries = sum(
        queries.numel(q_len, itemsize) + queries.dq_numel(q_len) * sums_itemsize
        for q_len in plan.q_lens
    )
    by_keys = sum(keys.numel(kv_len) * (itemsize + sums_itemsize) for kv_len in plan.kv_lens)
    able = plan.gathering is None and plan.stations > 1 and not setting.kernel.NEEDS_OUT
    return able and by_queries < by_keys


def attend(q: Tensor, kv: Tensor, wire: Wire, setting: Setting) -> State:
    """out [B, Sq, H, Dv] in q's dtype and lse [B, H, Sq], over the keys of all stations; `kv` is
    this station's.
    """
    state: State | None = None

    def visit(seen: Tensor, number: int) -> None:
        nonlocal state
        keys, values = wire.split(seen)
        with torch.autocast(seen.device.type, enabled=False):
            state = setting.kernel.forward(q, keys, values, setting.step(number), state)

    setting.show(kv, visit, wire.message(kv, setting.plan))
    return state or empty_state(q, wire.v_head_dim)


def gradients(
    q: Tensor, kv: Tensor, wire: Wire, rows: Rows, setting: Setting
) -> tuple[Tensor, Tensor]:
    """dq like q, and dkv like kv: what the queries of all stations give to this station's keys.

    Keys go round, with the sums of their gradients; or queries, if that is fewer bytes.
    """
    travels = setting.sums_dtype or sums_dtype(q.dtype, setting.plan)
    if queries_travel(QueryWire.of(q, wire), wire, setting, q.dtype.itemsize, travels.itemsize):
        return _by_queries(q, kv, wire, rows, setting, travels)
    return _by_keys(q, kv, wire, rows, setting, travels)


def sums_dtype(dtype: torch.dtype, plan: Plan) -> torch.dtype:
    """In which dtype the sums of gradients travel, for q of `dtype`."""
    # Where only one other rank adds, or each sends its own part, a part is rounded but once.
    once = plan.stations <= 2 or plan.gathering is not None
    return dtype if once else accumulation_dtype(dtype)


def _by_keys(
    q: Tensor, kv: Tensor, wire: Wire, rows: Rows, setting: Setting, travels: torch.dtype
) -> tuple[Tensor, Tensor]:
    plan, dtype = setting.plan, accumulation_dtype(q.dtype)
    own_dtype = q.dtype if plan.stations == 1 or setting.kernel.ROUNDS else dtype
    other_dtype = q.dtype if setting.kernel.ROUNDS else travels
    dq: Tensor | None = None
    kept: Tensor | None = None

    def visit(seen: Tensor, number: int) -> Tensor:
        nonlocal dq, kept
        own = number == plan.rank
        dkv = torch.empty_like(seen, dtype=own_dtype if own else other_dtype)
        with torch.autocast(seen.device.type, enabled=False):
            dq = setting.kernel.backward(
                q, wire.split(seen), rows, setting.step(number), dq, wire.split(dkv)
            )
        kept = dkv if own else kept
        return dkv

    others = setting.show(kv, visit, wire.message(kv, plan, travels))
    return torch.zeros_like(q) if dq is None else dq, _sum(kv, kept, others)


def _by_queries(
    q: Tensor, kv: Tensor, wire: Wire, rows: Rows, setting: Setting, travels: torch.dtype
) -> tuple[Tensor, Tensor]:
    plan, dtype = setting.plan.turned, accumulation_dtype(q.dtype)
    turned = replace(setting, plan=plan)
    queries = QueryWire.of(q, wire)
    dkv: Tensor | None = None
    kept: Tensor | None = None

    def visit(seen: Tensor, source: int) -> Tensor:
        nonlocal dkv, kept
        own = source == plan.rank
        theirs, their_rows = (q, rows) if own else queries.split(seen, plan.q_lens[source], q.dtype)
        part = torch.empty_like(kv, dtype=q.dtype if setting.kernel.ROUNDS else dtype)
        step = replace(turned.step(source), final=travels == q.dtype and not own)
        with torch.autocast(seen.device.type, enabled=False):
            dq = setting.kernel.backward(
                theirs, wire.split(kv), their_rows, step, None, wire.split(part)
            )
        if source != plan.final:
            dkv = part if dkv is None else dkv.to(dtype).add_(part)
        elif dkv is None or dkv.dtype != kv.dtype:
            dkv = _sum(kv, dkv, part)
        else:
            dkv.add_(part)
        kept = dq if own else kept
        return dq.to(travels).flatten()

    message = Message(
        lambda source: queries.numel(plan.q_lens[source], q.dtype.itemsize),
        torch.uint8,
        q.device,
        travels,
        lambda source: queries.dq_numel(plan.q_lens[source]),
    )
    # Straight on, past `show`: no caller but this may hold the message, which goes once it is sent.
    others = ring_pass(queries.join(q, rows), plan.path, visit, message)
    dq = _sum(q, kept, None if others is None else others.view(q.shape))
    return dq, torch.zeros_like(kv) if dkv is None else dkv


def _sum(like: Tensor, own: Tensor | None, others: Tensor | None) -> Tensor:
    """The sum of what there is, in the dtype of `like`."""
    one, *more = [part for part in (own, others) if part is not None] or [torch.zeros_like(like)]
    return torch.add(one, *more, out=torch.empty_like(like)) if more else one.to(like.dtype)
