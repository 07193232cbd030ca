"""Exact attention over a sequence that is spread over ranks (arXiv:2310.01889, section 3)."""

from typing import Literal, overload

import torch
from torch import Tensor

from ring_sp.fit import Options
from ring_sp.kernels.merge import weight
from ring_sp.operator import operate
from ring_sp.sequence import ShardedSequence


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
    `sequence.mask`, over the global positions of both. Weights are dropped with probability
    `dropout_p`, by `dropout_seed`, batch entry, head and positions alone: one seed for all ranks of
    the sequence, another for each layer, step and data rank. Scores are q.k * scale (default 1 /
    sqrt(D)), then softcap * tanh(score / softcap) if `softcap` is given; `sinks` [H] are logits of
    one more key per head, whose value is zero. Returns out [B, local_len, H, Dv] in q's dtype and,
    if `return_lse`, (out, lse) with lse [B, H, local_len], natural log of the sum of exp(score)
    over the keys and the sink, in float32 (float64 for float64 inputs); both are differentiable,
    once. The gradients are of this rank's tensors; that of `sinks` is this rank's share, to be
    summed over ranks as weights' gradients are. A query that sees nothing gets zeros and lse = -inf
    (the sink's logit where there is one).

    Raises ValueError for options that make no sense, and tensors that do not fit each other or the
    sequences, NotImplementedError for dropout over 2**31 positions or more: on every rank in the
    first call with these options over these sequences, later where it is seen. Shapes, dtypes and
    options that are new must be new on all ranks: a call that only some ranks change leaves the
    others waiting until torch.distributed's timeout. Raises NotImplementedError for tensors with a
    forward-mode gradient.
    """
    keys = sequence if kv_sequence is None else kv_sequence
    options = Options(scale, softcap, dropout_p, dropout_seed, kernel, return_lse)
    out, lse = operate(q, k, v, sequence, keys, sinks, options)
    if sinks is not None:
        joint = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
        out, lse = (
            (out * weight(lse - joint.clamp_min(torch.finfo(joint.dtype).min))).to(out.dtype),
            joint,
        )
    return (out, lse) if return_lse else out
