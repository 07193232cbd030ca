"""Refuse a call that does not fit: on every rank the first time, later on the ranks that see it."""

from collections.abc import Hashable
from math import inf, isfinite
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ring_sp.sequence import ShardedSequence


def require_fit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequence: ShardedSequence,
    keys: ShardedSequence,
    sinks: Tensor | None,
    options: tuple[Any, ...],
) -> None:
    """Raise ValueError on every rank if a rank's tensors do not fit; costs a lookup once a call
    has passed.
    """
    common = [(x.shape[:1] + x.shape[2:], x.dtype) for x in (q, k, v)]
    call = (
        *common,
        q.shape[1:2],
        k.shape[1:2],
        v.shape[1:2],
        q.device,
        k.device,
        v.device,
        keys.seq_len,
        keys.layout,
        keys.topology,
        sinks if sinks is None else sinks.shape,
        options,
    )
    if call not in sequence.agreed:
        shapes = ", ".join(
            f"{name} {tuple(shape)} {dtype}"
            for name, (shape, dtype) in zip("qkv", common, strict=True)
        )
        signature = (
            f"shapes without tokens {shapes}; {sequence}, checksum {sequence.checksum}; "
            f"keys {keys.seq_len} tokens {keys.layout}; scale, softcap, kernel {options}"
        )
        _agree(
            sequence,
            call,
            signature,
            _problem(q, k, v, sequence, keys, sinks) or _option(*options[:2]),
        )


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequence: ShardedSequence,
    keys: ShardedSequence,
    sinks: Tensor | None,
) -> str | None:
    """What is wrong with a call, as seen on this rank: what is needed, what came, what to do."""
    tensors = {"q": q, "k": k, "v": v}
    for name, x in tensors.items():
        if x.dim() != 4 or 0 in x.shape:
            need = "must be [batch, tokens, heads, head dim], none of them 0"
            return f"{name} {need}; got shape {tuple(x.shape)}"
    heads, kv_heads = q.shape[2], k.shape[2]
    needs = (
        (
            q.dtype.is_floating_point and q.dtype == k.dtype == v.dtype,
            "q, k and v must share one floating-point dtype",
        ),
        (q.device == k.device == v.device, "q, k and v must be on one device"),
        (q.shape[0] == k.shape[0] == v.shape[0], "q, k and v must have one batch size"),
        (k.shape[1:3] == v.shape[1:3], "k and v must have the same tokens and heads"),
        (q.shape[3] == k.shape[3], "q and k must have one head dimension"),
        (
            heads % kv_heads == 0,
            f"the key heads must divide the query heads; {kv_heads} does not divide {heads}",
        ),
        (
            q.shape[1] == sequence.local_len,
            f"q must hold this rank's {sequence.local_len} tokens ({sequence}): sequence.shard",
        ),
        (
            k.shape[1] == keys.local_len,
            f"k and v must hold this rank's {keys.local_len} tokens of their kv_sequence ({keys})",
        ),
        (
            keys.topology == sequence.topology,
            "kv_sequence must live on the same topology as the sequence of the queries",
        ),
        (
            sinks is None or sinks.shape == (heads,),
            f"sinks must be [{heads}], one logit for each query head",
        ),
    )
    failed = next((need for met, need in needs if not met), None)
    if failed:
        came = (f"{name} {tuple(x.shape)} {x.dtype} on {x.device}" for name, x in tensors.items())
        return f"{failed}. Got {', '.join(came)}."
    try:
        for source in range(sequence.topology.ring_size):
            sequence.plan(keys).tiles(source)
    except ValueError as error:
        return str(error)
    return None


def _option(scale: float | None, softcap: float | None) -> str | None:
    if scale is not None and not (isinstance(scale, int | float) and isfinite(scale)):
        return f"scale must be None or a finite number; got {scale}"
    if softcap is not None and not (isinstance(softcap, int | float) and 0 < softcap < inf):
        return f"softcap must be None or a finite number above 0; got {softcap}"
    return None


def _agree(sequence: ShardedSequence, call: Hashable, signature: str, problem: str | None) -> None:
    """Raise ValueError on every rank if one found a problem or their signatures differ; else
    remember `call`.

    Once ranks have agreed on some call, a new problem is raised where it is found: the others may
    be under way.
    """
    if sequence.agreed and problem is not None:
        raise ValueError(problem)
    topology = sequence.topology
    reports: list[tuple[str, str | None]] = [(signature, problem)] * topology.size
    if topology.size > 1:
        dist.all_gather_object(reports, (signature, problem), group=topology.group)
    _raise_disagreement(reports, topology.rank)
    sequence.agreed.add(call)


def _raise_disagreement(reports: list[tuple[str, str | None]], rank: int) -> None:
    problems = {
        number: problem for number, (_, problem) in enumerate(reports) if problem is not None
    }
    if rank in problems:
        raise ValueError(problems[rank])
    if problems:
        number, problem = next(iter(problems.items()))
        raise ValueError(
            f"rank {number} of the sequence-parallel group refused its call: {problem}"
        )
    for number, (signature, _) in enumerate(reports):
        if signature != reports[0][0]:
            raise ValueError(
                f"all ranks of a sequence-parallel group must make the same call; rank 0 has "
                f"{reports[0][0]}, rank {number} has {signature}. Give every rank "
                f"the same batch, heads and sequence."
            )
