"""Exact attention over a sequence that is spread over ranks (arXiv:2310.01889, section 3)."""

from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ring_sp.fit import Options, fitting_kernel
from ring_sp.kernels import Kernel, Step
from ring_sp.kernels.contract import Rows, State, accumulation_dtype, empty_state
from ring_sp.kernels.merge import weight
from ring_sp.ring import Message, ring_pass
from ring_sp.sequence import Plan, ShardedSequence
from ring_sp.topology import Topology
from ring_sp.ulysses import kv_replication, to_heads, to_sequence


@overload
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequence: ShardedSequence,
    kv_sequence: ShardedSequence | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    kernel: str = "auto",
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequence: ShardedSequence,
    kv_sequence: ShardedSequence | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    kernel: str = "auto",
    *,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequence: ShardedSequence,
    kv_sequence: ShardedSequence | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    kernel: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]: ...


# The compiler breaks its graph here; torch.compiler.disable does too, but imports the compiler.
@torch._disable_dynamo
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequence: ShardedSequence,
    kv_sequence: ShardedSequence | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    kernel: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of this rank's queries over the keys of all ranks. Collective over the sequence's
    topology.

    q is [B, local_len, H, D], k [B, local kv len, Hkv, D], v [B, local kv len, Hkv, Dv], of one
    floating-point dtype and device; Hkv divides H, and head h reads key head h // (H // Hkv).
    `kv_sequence` (default `sequence`) says where the keys live, for cross attention; the mask is
    `sequence.mask`, over the global positions of both. Scores are q.k * scale (default 1 /
    sqrt(D)), then softcap * tanh(score / softcap) if `softcap` is given; `sinks` [H] are logits of
    one more key per head, whose value is zero. Returns out [B, local_len, H, Dv] in q's dtype and,
    if `return_lse`, (out, lse) with lse [B, H, local_len], natural log of the sum of exp(score)
    over the keys and the sink, in float32 (float64 for float64 inputs); both are differentiable,
    once. The gradients are of this rank's tensors; that of `sinks` is this rank's share, to be
    summed over ranks as weights' gradients are. A query that sees nothing gets zeros and lse = -inf
    (the sink's logit where there is one).

    Raises ValueError for tensors that do not fit each other or the sequences, and
    NotImplementedError for dropout: on every rank in the first call of its kind, later where it is
    seen. A new kind of call must be new on all ranks: one that only some ranks make leaves the
    others waiting until torch.distributed's timeout.
    """
    keys = sequence if kv_sequence is None else kv_sequence
    options = Options(scale, softcap, dropout_p, dropout_seed, kernel, return_lse)
    chosen = fitting_kernel(q, k, v, sequence, keys, sinks, options)
    topology = sequence.topology
    copies = kv_replication(q.shape[2], k.shape[2], topology.ulysses.size)
    q = to_heads(q, topology.ulysses, _peer_lens(sequence))
    if copies > 1:
        k, v = (x.repeat_interleave(copies, 2) for x in (k, v))
    k, v = (to_heads(x, topology.ulysses, _peer_lens(keys)) for x in (k, v))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    setting = _Setting(sequence.plan(keys), topology, chosen, scale, softcap)
    out, lse = _RingAttention.apply(q, k, v, setting)
    out = to_sequence(out, topology.ulysses, _peer_lens(sequence))
    if sinks is None and not return_lse:
        return out
    lse = to_sequence(lse.transpose(1, 2).unsqueeze(-1), topology.ulysses, _peer_lens(sequence))
    lse = lse.squeeze(-1).transpose(1, 2)
    if sinks is not None:
        joint = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
        out, lse = (
            (out * weight(lse - joint.clamp_min(torch.finfo(joint.dtype).min))).to(out.dtype),
            joint,
        )
    return (out, lse) if return_lse else out


@dataclass(frozen=True)
class _Setting:
    """All that a pass round the ring needs besides the tensors."""

    plan: Plan
    topology: Topology
    kernel: Kernel
    scale: float
    softcap: float | None

    def step(self, source: int) -> Step:
        plan = self.plan
        final, derived = source == plan.final, plan.derived[source]
        return Step(plan.tiles(source), self.scale, self.softcap, final, derived)


class _RingAttention(torch.autograd.Function):
    """Keeps q, kv, out and lse; no result of a step outlives it."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, setting: _Setting
    ) -> tuple[Tensor, Tensor]:
        q = q if q.stride(3) == 1 else q.contiguous()
        wire = Wire.of(k, v)
        kv = wire.join(k, v)
        state: State | None = None

        def visit(seen: Tensor, source: int) -> None:
            nonlocal state
            keys, values = wire.split(seen)
            with torch.autocast(seen.device.type, enabled=False):
                state = setting.kernel.forward(q, keys, values, setting.step(source), state)

        message = Message(
            lambda source: wire.numel(setting.plan.kv_len(source)), kv.dtype, kv.device
        )
        ring_pass(kv, setting.plan.path, visit, message)
        out, lse = state or empty_state(q, v)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, kv, out, lse)
        ctx.setting, ctx.wire = setting, wire
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dout: Tensor | None, dlse: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        q, kv, out, lse = ctx.saved_tensors
        setting, wire = ctx.setting, ctx.wire
        dtype = accumulation_dtype(q.dtype)
        dout = torch.zeros_like(out) if dout is None else dout
        dout = dout if dout.stride(3) == 1 else dout.contiguous()
        rows = Rows(out, lse, dout, dlse)
        dq: Tensor | None = None
        kept: Tensor | None = None

        travels = sums_dtype(q.dtype, setting.topology.ring_size)
        rounded = setting.topology.ring_size == 1 or setting.kernel.ROUNDS
        own_dtype = q.dtype if rounded else dtype

        def visit(seen: Tensor, source: int) -> Tensor:
            nonlocal dq, kept
            own = source == setting.plan.rank
            dkv = torch.empty_like(seen, dtype=own_dtype if own else travels)
            with torch.autocast(seen.device.type, enabled=False):
                dq = setting.kernel.backward(
                    q, wire.split(seen), rows, setting.step(source), dq, wire.split(dkv)
                )
            kept = dkv if own else kept
            return dkv

        message = Message(
            lambda source: wire.numel(setting.plan.kv_len(source)), kv.dtype, kv.device, travels
        )
        others = ring_pass(kv, setting.plan.path, visit, message)
        dkv = _sum(kv, kept, others)
        return torch.zeros_like(q) if dq is None else dq, *wire.split(dkv), None


def sums_dtype(dtype: torch.dtype, ring_size: int) -> torch.dtype:
    """In which dtype the gradients of keys and values travel, for q of `dtype`."""
    # Where only one other rank adds, its part is rounded but once.
    return accumulation_dtype(dtype) if ring_size > 2 else dtype


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


def _sum(like: Tensor, *parts: Tensor | None) -> Tensor:
    """The sum of the parts that exist, in the dtype of `like`."""
    one, *more = [part for part in parts if part is not None] or [torch.zeros_like(like)]
    return torch.add(one, *more, out=torch.empty_like(like)) if more else one.to(like.dtype)


def _peer_lens(sequence: ShardedSequence) -> tuple[int, ...]:
    """Tokens of this rank's Ulysses peers."""
    topology = sequence.topology
    first = topology.ring_rank * topology.ulysses.size
    return sequence.lens[first : first + topology.ulysses.size]
