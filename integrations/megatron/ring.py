"""What the ring layers of a Megatron model share, and how a batch tells them its sequence.

Megatron's name for our sequence-parallel group is the context-parallel group, and it is kept here.
"""

from dataclasses import dataclass
from functools import lru_cache

from megatron.core.packed_seq_params import PackedSeqParams
from torch.distributed import ProcessGroup

from ring_sp import ProcessGroupManager, ShardedSequence, Topology
from ring_sp.layout import shards
from ring_sp.masks import Mask


class MegatronRing:
    """The topology inside the context-parallel group, the layout, the kernel, and the sequences
    made so far."""

    def __init__(self, topology: Topology, layout: str = "zigzag", kernel: str = "auto") -> None:
        self.topology, self.layout, self.kernel = topology, layout, kernel
        self.has_positions = False
        """Whether the model takes its positions from here: `use_ring_positions` says so."""
        # A model meets few lengths and masks at a time; packed batches bring a new mask each.
        self.sequence = lru_cache(maxsize=16)(self._sequence)

    @classmethod
    def from_group(
        cls,
        group: ProcessGroup,
        *,
        layout: str = "zigzag",
        kernel: str = "auto",
        ulysses: int = 1,
        outer: int = 1,
    ) -> "MegatronRing":
        """Divide Megatron's context-parallel group into outer x ring x Ulysses.

        Where `ulysses` or `outer` exceeds 1, every rank of the world must call it: once, right
        after `initialize_model_parallel`. Raises ValueError for sizes that do not divide the group.
        """
        topology = ProcessGroupManager.from_group(group, ulysses=ulysses, outer=outer).topology
        return cls(topology, layout, kernel)

    def placed(self, sequence: ShardedSequence) -> ShardedSequence:
        """`sequence`, once it is sure that the model's positions are those of its tokens.

        Raises ValueError where Megatron's own rotary positions would be wrong and
        `use_ring_positions` was not called.
        """
        seq_len, size = sequence.seq_len, self.topology.size
        stock = seq_len % (2 * size) == 0 and sequence.shards == shards(seq_len, size, "zigzag")
        if size > 1 and not stock and not self.has_positions:
            raise ValueError(
                f"Megatron's own positions do not fit {sequence}: call use_ring_positions(model, "
                f"ring) on each model chunk, whatever its kind of positions."
            )
        return sequence

    def _sequence(self, seq_len: int, mask: Mask) -> ShardedSequence:
        return ShardedSequence(seq_len, self.topology, mask, self.layout)


@dataclass
class RingSequenceParams(PackedSeqParams):
    """The sequence of a batch, carried to every layer as `packed_seq_params`.

    For a mask that Megatron's arguments cannot say, such as packed documents; without it the
    layers take the batch as one causal sequence of local length times context-parallel size.
    """

    qkv_format: str = "sbhd"
    sequence: ShardedSequence | None = None
