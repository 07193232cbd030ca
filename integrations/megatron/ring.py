"""What the ring layers of a Megatron model share, and how a batch tells them its sequence.

Megatron's name for our sequence-parallel group is the context-parallel group, and it is kept here.
"""

from collections.abc import Hashable, MutableMapping
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import pairwise
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.weak import WeakTensorKeyDictionary

from ring_sp import ProcessGroupManager, ShardedSequence, Topology
from ring_sp.integrations.megatron.options import RingOptions
from ring_sp.integrations.megatron.recomputation import KeptInCheckpoints
from ring_sp.layout import ZigzagDocuments, joined, shards
from ring_sp.masks import Mask, causal, documents


class MegatronRing:
    """The topology inside the context-parallel group, the layout, the kernel, the sequences made so
    far, and what is kept of attention until it is recomputed, where `keep_attention`."""

    def __init__(
        self,
        topology: Topology,
        layout: str = "zigzag",
        kernel: str = "auto",
        keep_attention: bool = True,
    ) -> None:
        self.topology, self.layout, self.kernel = topology, layout, kernel
        self.keep_attention, self.kept = keep_attention, KeptInCheckpoints()
        self.has_positions = False
        """Whether the model takes its positions from here: `use_ring_positions` says so."""
        self.rolls_tokens = False
        """Whether multi-token prediction shifts tokens as the ring holds them: `install` says
        so."""
        # A model meets few lengths and masks at a time; packed batches bring a new mask each.
        self.sequence = lru_cache(maxsize=16)(self._sequence)
        # One that somebody still has, such as a checkpoint, is not made a second time.
        self._held: WeakValueDictionary[Hashable, ShardedSequence] = WeakValueDictionary()
        self._topology_over = lru_cache(maxsize=64)(self._make_topology_over)
        self._cuts: MutableMapping[Tensor, tuple[int, tuple[int, ...]]] = WeakTensorKeyDictionary()

    @classmethod
    def from_group(
        cls,
        group: ProcessGroup,
        *,
        layout: str = "zigzag",
        kernel: str = "auto",
        ulysses: int = 1,
        outer: int = 1,
        exchange: str = "messages",
        keep_attention: bool = True,
    ) -> "MegatronRing":
        """Divide Megatron's context-parallel group into outer x ring x Ulysses.

        Where `ulysses` or `outer` exceeds 1, every rank of the world must call it: once, right
        after `initialize_model_parallel`. `exchange` is that of `ProcessGroupManager.from_group`.
        With `keep_attention` the ring is gone round once where Megatron recomputes: of each call
        out, in the dtype of the queries, and lse [b, heads / tp, s / cp] in float32 are kept from
        the forward of its checkpoint to the recomputation. Raises ValueError for sizes that do not
        divide the group.
        """
        manager = ProcessGroupManager.from_group(
            group, ulysses=ulysses, outer=outer, exchange=exchange
        )
        return cls(manager.topology, layout, kernel, keep_attention)

    @classmethod
    def from_options(cls, options: RingOptions, group: ProcessGroup) -> "MegatronRing":
        """The ring that a command line asks for, in Megatron's context-parallel group; every rank
        of the world must call it. Raises ValueError for a group of another size.
        """
        if group.size() != options.size:
            raise ValueError(
                f"--sequence-parallel-ring asks for {options.size} ranks, and Megatron's "
                f"context-parallel group has {group.size()}: give both the same size"
            )
        return cls.from_group(
            group,
            layout=options.layout,
            kernel=options.kernel,
            ulysses=options.ulysses,
            outer=options.outer,
            exchange=options.exchange,
            keep_attention=options.keep_attention,
        )

    @property
    def is_stock(self) -> bool:
        """Whether ranks hold the tokens that Megatron's own context parallelism gives them."""
        return self.topology.size == 1 or (
            self.layout == "zigzag" and self.topology.ulysses.size == 1
        )

    def placed(self, sequence: ShardedSequence) -> ShardedSequence:
        """`sequence`, once it is sure that the model's positions are those of its tokens.

        Raises ValueError where Megatron's own rotary positions would be wrong and
        `use_ring_positions` was not called.
        """
        seq_len, size = sequence.seq_len, sequence.topology.size
        layout = sequence.layout if isinstance(sequence.layout, ZigzagDocuments) else "zigzag"
        stock = seq_len % (2 * size) == 0 and all(
            joined(own) == joined(wanted)
            for own, wanted in zip(sequence.shards, shards(seq_len, size, layout), strict=True)
        )
        if size > 1 and not stock and not self.has_positions:
            raise ValueError(
                f"Megatron's own positions do not fit {sequence}: call use_ring_positions(model, "
                f"ring) on each model chunk, whatever its kind of positions."
            )
        return sequence

    def packed(self, params: PackedSeqParams, inner: Mask | None = None) -> "RingSequenceParams":
        """Megatron's packed documents as a sequence of the ring; in each rules `inner`, by default
        causal.

        In zigzag layout each document is cut by itself, as Megatron does it, where 2 x ranks divide
        all of them; otherwise, and in other layouts, the whole sequence is cut. Raises ValueError
        for params without documents, and NotImplementedError where queries and keys differ.
        """
        cuts, lens = self._documents(params)
        mask = documents(cuts, inner, lens)
        topology = self.topology_of(params)
        layout: str | ZigzagDocuments = self.layout
        unit = 2 * topology.size
        if layout == "zigzag" and all((stop - start) % unit == 0 for start, stop in pairwise(cuts)):
            layout = ZigzagDocuments(cuts)
        sequence = self.sequence(cuts[-1], mask, topology, layout)
        kept = {field.name: getattr(params, field.name) for field in fields(params) if field.init}
        kept.update(qkv_format="sbhd", sequence=sequence, starts=cuts[:-1])
        return RingSequenceParams(**kept)

    def topology_of(self, params: PackedSeqParams | None) -> Topology:
        """Where a batch lives: the context-parallel group, or its own `cp_group` if it has one.

        Raises NotImplementedError for a group of its own in a ring with Ulysses, outer rings or
        another exchange than messages.
        """
        group: ProcessGroup | None = getattr(params, "cp_group", None)
        alone = group is None and getattr(params, "local_cp_size", None) == 1
        if group is None and not alone:
            return self.topology
        topology = Topology() if group is None else self._topology_over(group)
        parts = self.topology.ulysses.size, self.topology.outer.size
        special = parts != (1, 1) or self.topology.exchange != "messages"
        if special and topology != self.topology and topology.size > 1:
            raise NotImplementedError(
                "dynamic context-parallel groups are single rings that exchange messages: use no "
                "--ring-ulysses, --ring-outer or other --ring-exchange with them"
            )
        return topology

    def _make_topology_over(self, group: ProcessGroup) -> Topology:
        own = self.topology.group
        ranks = dist.get_process_group_ranks(group)
        if own is not None and dist.get_process_group_ranks(own) == ranks:
            return self.topology
        return ProcessGroupManager.from_group(group).topology

    def _documents(self, params: PackedSeqParams) -> tuple[tuple[int, ...], list[int] | None]:
        """Where each document starts and the last ends, and their lengths if some are padded."""
        if params.cu_seqlens_q is None:
            raise ValueError(
                "packed sequences need cu_seqlens_q in their PackedSeqParams; got None"
            )
        real = self._read(params.cu_seqlens_q)
        padded = params.cu_seqlens_q_padded
        cuts = real if padded is None else self._read(padded)
        for q, kv in (
            (params.cu_seqlens_q, params.cu_seqlens_kv),
            (padded, params.cu_seqlens_kv_padded),
        ):
            if kv is not None and (q is None or self._read(kv) != self._read(q)):
                raise NotImplementedError(
                    "the ring packs queries and keys alike; got PackedSeqParams whose cu_seqlens "
                    "differ between them"
                )
        if real == cuts:
            return cuts, None
        return cuts, [stop - start for start, stop in pairwise(real)]

    def _read(self, cu_seqlens: Tensor) -> tuple[int, ...]:
        """The values of a tensor that may be on a GPU, which are waited for once a tensor."""
        version, known = self._cuts.get(cu_seqlens, (None, ()))
        if version != cu_seqlens._version:
            known = tuple(cu_seqlens.flatten().tolist())
            self._cuts[cu_seqlens] = cu_seqlens._version, known
        return known

    def _sequence(
        self,
        seq_len: int,
        mask: Mask | None = None,
        topology: Topology | None = None,
        layout: str | ZigzagDocuments | None = None,
    ) -> ShardedSequence:
        place = seq_len, topology or self.topology, mask or causal(), layout or self.layout
        found = self._held.get(place)
        if found is None:
            found = self._held[place] = ShardedSequence(*place)
        return found


@dataclass
class RingSequenceParams(PackedSeqParams):
    """The sequence of a batch, carried to every layer as `packed_seq_params`.

    For a mask that Megatron's arguments cannot say, such as packed documents; without it the
    layers take the batch as one causal sequence of local length times context-parallel size.
    """

    qkv_format: str = "sbhd"
    sequence: ShardedSequence | None = None
    starts: tuple[int, ...] = ()
    """Where rotary positions start again at 0, in ascending order; nowhere if empty."""

    def positions(self, device: torch.device | str | None = None) -> Tensor:
        """Rotary positions of this rank's tokens, int64 [local_len]."""
        if self.sequence is None:
            raise ValueError("RingSequenceParams without a sequence have no positions")
        positions = self.sequence.positions(device)
        if not self.starts:
            return positions
        starts = torch.tensor(self.starts, device=device)
        return positions - starts[torch.searchsorted(starts, positions, right=True) - 1]
