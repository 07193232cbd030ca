"""Unsharded attention with an explicit mask, for the ring to be compared with."""

import torch
from torch import Tensor
from visibility import Sees


def dense_mask(sees: Sees, q_len: int, kv_len: int) -> Tensor:
    """bool [q_len, kv_len]: who sees whom."""
    return torch.tensor([[sees(q, k) for k in range(kv_len)] for q in range(q_len)])


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [B, S, H, Dv], lse [B, H, S]) of q [B, S, H, D], k [B, Sk, Hkv, D], v [B, Sk, Hkv,
    Dv]; `kept` [B, H, S, Sk] is what dropout makes of each weight.
    """
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (
        q.shape[-1] ** -0.5 if scale is None else scale
    )
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # A finite floor keeps the gradients of rows that see nothing at zero instead of NaN.
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min / 2)
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1)[..., : k.shape[1]] * visible.any(-1, keepdim=True)
    weights = weights if kept is None else weights * kept
    lse = scores.logsumexp(-1)
    if sinks is None:
        lse = lse.masked_fill(~visible.any(-1), -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), lse
