"""What a training loop asks of an engine's ring."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ring_sp import ProcessGroupManager, ShardedSequence
from ring_sp.integrations.deepspeed.averaging import gradient_divisor
from ring_sp.integrations.deepspeed.block import RingBlock
from ring_sp.integrations.deepspeed.hosted import hugging_face_ring
from ring_sp.loss import IGNORE, cross_entropy_mean, token_mean
from ring_sp.masks import Mask

if TYPE_CHECKING:
    from ring_sp.integrations.huggingface import HuggingFaceRing, RingBatch


@dataclass(frozen=True, eq=False)
class DeepSpeedRing:
    """`engine.ring` of an engine from `initialize`."""

    engine: Any = field(repr=False)
    block: RingBlock
    manager: ProcessGroupManager
    """Groups, sizes and ranks: `manager.rank("data")` is the number of this rank's ring."""
    sequence: Callable[..., ShardedSequence]
    """sequence(seq_len, mask=None): where sequences under a mask (default causal) live. It shards
    tensors, and gives the positions of this rank's tokens. The same object for equal arguments.
    """
    hugging_face: "HuggingFaceRing | None"
    """None for a model that is not of transformers."""

    @classmethod
    def of(cls, engine: Any, manager: ProcessGroupManager, block: RingBlock) -> "DeepSpeedRing":
        """For an engine of `deepspeed.initialize(mpu=RingMPU(manager))`, what `initialize` gives
        one of its own. Raises ValueError for a model of transformers with another attention.
        """
        # A model meets few lengths and masks at a time; packed batches bring new masks each.
        sequence = lru_cache(maxsize=64)(
            lambda seq_len, mask=None: ShardedSequence(
                seq_len, manager.topology, mask, block.layout
            )
        )
        hosted = hugging_face_ring(engine.module, manager, block)
        return cls(engine, block, manager, sequence, hosted)

    def batch(
        self,
        batch: Mapping[str, Any],
        inner: Mask | None = None,
        dropout_seed: int | None = None,
    ) -> "RingBatch":
        """This rank's part of a Hugging Face batch that all ranks of its ring hold whole: see
        `HuggingFaceRing.batch`. Raises ValueError for a model that is not of transformers.
        """
        if self.hugging_face is None:
            raise ValueError(
                f"{type(self.engine.module).__name__} is no model of transformers: cut its tensors "
                f"with sequence = engine.ring.sequence(seq_len), sequence.shard(x)"
            )
        return self.hugging_face.batch(batch, inner, dropout_seed)

    def loss(
        self, logits: Tensor, shift_labels: Tensor | None, count: Tensor | None = None
    ) -> Tensor:
        """The mean cross entropy over the labelled tokens of all ranks, for `engine.backward`.

        logits [B, local_len, V] and shift_labels int64 [B, local_len] are of this rank's tokens
        (`ring_sp.loss.shift_labels` before they are cut, as `batch` does). `count` as in `mean`.
        The same value on each rank. Collective over data and sequence ranks.
        """
        group, divisor = self._reduced(count)
        return cross_entropy_mean(logits, shift_labels, group, divisor, count)

    def mean(self, losses: Tensor, counted: Tensor, count: Tensor | None = None) -> Tensor:
        """The mean of `losses` over the tokens that are `counted`, on all ranks: `token_mean` with
        the factor of this engine.

        losses and counted (bool) have one shape, this rank's tokens. With gradient accumulation
        `count` is the number of counted tokens of all micro-batches of the step on all ranks, see
        `count`; the means of the micro-batches then add up to that of the step. Raises ValueError
        if it is missing, or if batch sizes of the engine were set as if its ring had one rank.
        """
        group, divisor = self._reduced(count)
        return token_mean(losses, counted, group, divisor, count)

    def count(self, shift_labels: Iterable[Tensor]) -> Tensor:
        """Labelled tokens on all ranks of the micro-batches whose `shift_labels`, this rank's part,
        are given; int64 []. Collective over data and sequence ranks.
        """
        total = torch.stack([(labels != IGNORE).sum() for labels in shift_labels]).sum()
        if self.manager.group("data_sequence") is not None:
            dist.all_reduce(total, group=self.manager.group("data_sequence"))
        return total

    def unshard(self, x: Tensor, sequence: ShardedSequence, dim: int = 1) -> Tensor:
        """The whole tensor, such as logits, on every rank of the ring, from the ranks' parts."""
        return sequence.unshard(x, dim)

    def _reduced(self, count: Tensor | None) -> tuple[dist.ProcessGroup | None, int]:
        """The ranks that share a loss, and by how much the engine divides its gradient."""
        engine, rings = self.engine, self.manager.size("data")
        steps, micro = engine.gradient_accumulation_steps(), engine.train_micro_batch_size_per_gpu()
        if engine.train_batch_size() != micro * steps * rings:
            raise ValueError(
                f"the engine's batch sizes say {engine.train_batch_size()} sequences a step, and "
                f"{rings} rings take {micro} in each of {steps} steps. Its set_train_batch_size "
                f"takes each rank of a ring for a data rank: build a new engine instead."
            )
        if steps > 1 and count is None and torch.is_grad_enabled():
            raise ValueError(
                f"gradients accumulate over {steps} micro-batches, and the mean over all their "
                f"tokens needs count=engine.ring.count(shift_labels of each of them)"
            )
        return self.manager.group("data_sequence"), gradient_divisor(engine)
