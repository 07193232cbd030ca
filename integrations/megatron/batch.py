"""A batch cut as the ring holds it, where Megatron's scripts cut theirs."""

from collections.abc import Callable
from inspect import Signature
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from ring_sp import ShardedSequence
from ring_sp.integrations.megatron.ring import MegatronRing

Batch = dict[str, Any]

_ABOUT_THE_SEQUENCE = {
    "attention_mask",
    "cu_seqlens",
    "cu_seqlens_padded",
    "max_seqlen",
    "local_cp_size",
    "hybrid_cp_group",
}
"""What a batch has besides tokens and what goes with each: as in Megatron's own split."""


class SplitBatch:
    """Takes the place of Megatron's `get_batch_on_this_cp_rank`, in any of its versions."""

    def __init__(self, ring: Callable[[], MegatronRing], signature: Signature) -> None:
        self._ring, self.__signature__ = ring, signature

    def __call__(self, batch: Batch, *args: Any, **kwargs: Any) -> Batch:
        """The batch, in place, with this rank's tokens: packed documents as `ring.packed` says,
        else the whole sequence in the ring's layout.

        A causal attention mask is dropped, as the ring's layers need none. Raises
        NotImplementedError for any other.
        """
        given = self.__signature__.bind(batch, *args, **kwargs).arguments
        params = PackedSeqParams(qkv_format="thd", cp_group=given.get("cp_group"))
        if given.get("is_hybrid_cp") and batch.get("cu_seqlens") is not None:
            params.local_cp_size = int(batch["local_cp_size"])
            if params.local_cp_size > 1:
                params.cp_group = given["hybrid_cp_group_func"](group_size=params.local_cp_size)
                batch["hybrid_cp_group"] = params.cp_group
            else:
                params.cp_group = None
        sequence = sequence_of(batch, params, self._ring())
        return batch if sequence is None else cut(batch, sequence)


class SplitPackedBatch:
    """Takes the place of `get_thd_batch_on_this_cp_rank` of Megatron-core 0.16 and 0.17."""

    def __init__(self, ring: Callable[[], MegatronRing]) -> None:
        self._ring = ring

    def __call__(
        self,
        batch: Batch,
        cu_seqlens: Tensor,
        cu_seqlens_padded: Tensor,
        max_seqlen: Tensor,
        *_: object,
        **__: object,
    ) -> tuple[Batch, PackedSeqParams]:
        """This rank's tokens, and what the model is told of the documents."""
        longest = int(max_seqlen[0])
        params = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            cu_seqlens_q_padded=cu_seqlens_padded,
            cu_seqlens_kv_padded=cu_seqlens_padded,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        place = self._ring().packed(params)
        assert place.sequence is not None
        return cut(batch, place.sequence), params


def sequence_of(
    batch: Batch, params: PackedSeqParams, ring: MegatronRing
) -> ShardedSequence | None:
    """Where the tokens of a whole batch live; None if this pipeline stage has none."""
    parts = list(_along_the_sequence(batch).values())
    if not parts:
        return None
    rows, seq_len = parts[0].shape[:2]
    if batch.get("cu_seqlens") is None:
        topology = ring.topology_of(params)
        return ring.sequence(seq_len, None, topology)
    if rows != 1:
        raise ValueError(
            f"packed sequences come as one row of tokens; got {rows} rows. Flatten the batch "
            f"(flatten_batch_for_packed_sequences), or use --micro-batch-size 1."
        )
    padded = batch.get("cu_seqlens_padded")
    params.cu_seqlens_q = batch["cu_seqlens"] if padded is None else padded
    return ring.packed(params).sequence


def cut(batch: Batch, sequence: ShardedSequence) -> Batch:
    """The batch, in place, with this rank's tokens of the sequence."""
    for key, whole in _along_the_sequence(batch).items():
        batch[key] = sequence.shard(whole, 1)
    mask = batch.get("attention_mask")
    if mask is not None:
        refuse_unless_causal(mask)
        batch["attention_mask"] = None
    return batch


def _along_the_sequence(batch: Batch) -> dict[str, Tensor]:
    """The entries [rows, S, ...] of a batch, which may be a script's own."""
    return {
        key: value
        for key, value in batch.items()
        if isinstance(value, Tensor) and value.dim() > 1 and key not in _ABOUT_THE_SEQUENCE
    }


def refuse_unless_causal(hidden: Tensor) -> None:
    """Raise NotImplementedError unless a mask [..., S, S], true where a key is hidden, hides what
    comes later and nothing else, and while a CUDA graph is recorded, which waits for no mask.
    """
    if hidden.is_cuda and torch.cuda.is_current_stream_capturing():
        raise NotImplementedError(
            "a CUDA graph cannot look at the dataloader's attention mask: give "
            "--no-create-attention-mask-in-dataloader"
        )
    later = torch.ones(hidden.shape[-2:], dtype=torch.bool, device=hidden.device).triu(1)
    if hidden.shape[-1] != hidden.shape[-2] or not bool((hidden.bool() == later).all()):
        raise NotImplementedError(
            "the dataloader's attention mask is not plain causal, and the ring takes no mask "
            "tensors: leave --reset-attention-mask out; packed documents come with "
            "--dataloader-inter-document-masking or --sft"
        )
