"""What the layers of a Hugging Face model share, and how a batch tells them its sequence."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ring_sp import ProcessGroupManager, ShardedSequence, masks
from ring_sp.integrations.huggingface.batch import RingBatch, WholeBatch
from ring_sp.loss import cross_entropy_mean
from ring_sp.masks import Mask

LAYER_STRIDE = 0x1E3779B97F4A7C15
"""Between the dropout seeds of layers."""
DATA_STRIDE = 0x3F58476D1CE4E5B9
"""Between those of data ranks, whose tokens are others."""


class HuggingFaceRing:
    """The groups, the layout, the kernel, and the sequences made so far.

    Where data and sequence ranks divide the world, gradients are reduced over all of them, as DDP,
    FSDP2 and DeepSpeed without an mpu do by default.
    """

    def __init__(
        self, manager: ProcessGroupManager, layout: str = "zigzag", kernel: str = "auto"
    ) -> None:
        """`manager` is of `ProcessGroupManager.build`, which all ranks call; `layout` is that of
        `ShardedSequence`, `kernel` that of `ring_attention`.
        """
        self.manager, self.layout, self.kernel = manager, layout, kernel
        # A model meets few lengths and masks at a time; packed batches bring new masks each.
        self.sequence = lru_cache(maxsize=64)(self._sequence)

    def batch(
        self,
        batch: Mapping[str, Any],
        inner: Mask | None = None,
        dropout_seed: int | None = None,
    ) -> RingBatch:
        """This rank's part of a batch that every rank of its sequence holds whole.

        `batch` has input_ids [B, S] or inputs_embeds [B, S, E], of any S from the number of ranks
        up, and may have labels [B, S] (token t's own, as Hugging Face's collators make them; or
        shift_labels, token t's next), position_ids [B or 1, S], attention_mask [B, S] with
        padding on the right, and cu_seq_lens_q of packed documents; position_ids that start again
        say the same. `inner` (default causal) rules inside each document. With `dropout_seed`,
        another for each step, attention may drop weights. No communication. Raises ValueError
        for keys that are not known here, shapes that differ, rows packed differently, labels or
        gaps in padding, and NotImplementedError for 4-D masks.
        """
        whole = WholeBatch.read(batch, inner)
        sequence = self.sequence(whole.seq_len, whole.mask)
        if dropout_seed is not None:
            dropout_seed += DATA_STRIDE * self.manager.rank("data")
        return whole.cut(sequence, RingContext(self, sequence, dropout_seed))

    def loss(
        self,
        logits: Tensor,
        shift_labels: Tensor | None,
        averaged_over: int = 1,
        count: Tensor | None = None,
    ) -> Tensor:
        """The mean cross entropy over the labelled tokens of all ranks, the same value on each.

        logits [B, local_len, V], shift_labels int64 [B, local_len] from `batch`. `averaged_over` is
        the number of ranks over which the host averages gradients afterwards: the world's size
        for DDP and FSDP2, 1 where it sums. `count` as in `ring_sp.loss.token_mean`, for batches
        that accumulate. Collective over data and sequence ranks.
        """
        group = self.manager.group("data_sequence")
        return cross_entropy_mean(logits, shift_labels, group, averaged_over, count)

    def _sequence(self, seq_len: int, mask: Mask | None = None) -> ShardedSequence:
        return ShardedSequence(seq_len, self.manager.topology, mask, self.layout)


@dataclass(frozen=True, eq=False)
class RingContext:
    """The sequence of a batch, carried to every layer as the model's keyword argument `ring_sp`."""

    ring: HuggingFaceRing
    sequence: ShardedSequence
    dropout_seed: int | None = None

    def windowed(self, window: int | None) -> ShardedSequence:
        """The sequence where a query sees the last `window` keys, its own included; all for None.

        Raises NotImplementedError for a mask that cannot be narrowed, or the balanced layout.
        """
        if window is None:
            return self.sequence
        if self.ring.layout == "balanced":
            raise NotImplementedError(
                "the balanced layout follows the mask, and layers with a sliding window have "
                "another than the batch; use HuggingFaceRing(layout='zigzag'), striped or "
                "contiguous"
            )
        mask = masks.windowed(self.sequence.mask, window - 1)
        return self.ring.sequence(self.sequence.seq_len, mask)

    def seed(self, layer: torch.nn.Module) -> int:
        """Of one layer's dropout. Raises ValueError without a seed, NotImplementedError for a layer
        without a number.
        """
        if self.dropout_seed is None:
            raise ValueError(
                "attention dropout over a ring needs a seed that all its ranks share: "
                "ring.batch(batch, dropout_seed=step), or set the config's attention_dropout to 0"
            )
        number = getattr(layer, "layer_idx", None)
        if number is None:
            raise NotImplementedError(
                f"{type(layer).__name__} has no layer_idx that tells its dropout from that of "
                f"other layers; set the config's attention_dropout to 0"
            )
        return (self.dropout_seed + (number + 1) * LAYER_STRIDE) % (1 << 63)
