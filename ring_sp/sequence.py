"""Where one sequence lives: the join of topology, layout and mask."""

from collections.abc import Hashable
from functools import cached_property
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ring_sp import layout as layouts
from ring_sp import masks
from ring_sp.agreement import agree, refusal
from ring_sp.layout import ZigzagDocuments, shard_len, whole_number
from ring_sp.masks import Mask
from ring_sp.plan import Plan, positions
from ring_sp.topology import Topology


class ShardedSequence:
    """One sequence spread over the ranks of a topology, and the mask that rules it.

    Batch slicing, rotary positions, attention and loss all read this object. Make one per sequence
    length and mask and keep it: it remembers the tiles that it worked out.
    """

    def __init__(
        self,
        seq_len: int,
        topology: Topology | None = None,
        mask: Mask | None = None,
        layout: str | ZigzagDocuments = "zigzag",
    ) -> None:
        """`seq_len` in tokens; `mask` defaults to causal, `topology` to one rank by itself.

        Raises ValueError for an unknown layout, a mask that is none or longer than the sequence,
        or fewer tokens than ranks; on every rank, without communication.
        """
        self.seq_len, self.layout = whole_number("seq_len", seq_len), layout
        self.topology = Topology() if topology is None else topology
        if not isinstance(self.topology, Topology):
            raise ValueError(
                f"topology must be a Topology, such as manager.topology; got {type(topology)}"
            )
        self.mask = masks.causal() if mask is None else mask
        if not isinstance(self.mask, Mask):
            raise ValueError(
                f"mask must be made by a function of ring_sp.masks, such as causal(); got {mask!r}"
            )
        peers = self.topology.ulysses.size
        if self.seq_len < self.topology.size:
            raise ValueError(
                f"a sequence over {self.topology.size} ranks needs at least that many tokens; "
                f"got {seq_len}. Use a longer sequence or fewer sequence-parallel ranks."
            )
        self._regions = self.mask.regions(seq_len)
        self.ring_shards = layouts.shards(seq_len, self.topology.ring_size, layout, self._work)
        """The tokens at each station of the ring: those of all Ulysses peers there."""
        self.shards = tuple(
            piece for shard in self.ring_shards for piece in layouts.split(shard, peers)
        )
        """The tokens of each rank."""
        self.number = next(_NUMBERS)
        """Its name where only numbers and tensors can go; see `numbered`."""
        _NUMBERED[self.number] = self
        self._plans: WeakKeyDictionary[ShardedSequence, Plan] = WeakKeyDictionary()
        self.served: dict[Hashable, Any] = {}
        """The calls that are known to fit, and what serves them; see fit.py."""

    @cached_property
    def lens(self) -> tuple[int, ...]:
        """Tokens of each rank; they differ by at most one."""
        return tuple(map(shard_len, self.shards))

    @property
    def local_len(self) -> int:
        """Tokens of this rank."""
        return self.lens[self.topology.rank]

    @cached_property
    def peer_lens(self) -> tuple[int, ...]:
        """Tokens of this rank's Ulysses peers."""
        size = self.topology.ulysses.size
        first = self.topology.ring_rank * size
        return self.lens[first : first + size]

    def positions(self, device: torch.device | str | None = None) -> Tensor:
        """Global positions of this rank's tokens, int64 [local_len]."""
        return positions(self.shards[self.topology.rank], device)

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of a tensor that every rank holds whole, seq_len long along `dim`.

        The gradient of `x` is whole again on every rank. Raises ValueError for another length.
        """
        self._check_len(x, dim, self.seq_len, "the whole sequence")
        return _Shard.apply(x, self, dim) if x.requires_grad else _take(x, self, dim)

    def unshard(self, x: Tensor, dim: int = 1) -> Tensor:
        """The whole tensor on every rank from the ranks' parts, local_len long along `dim`.

        All ranks must go on with the same computation: each takes its own part of the gradient.
        Raises ValueError for a part of another length, or parts that are not alike: on every rank
        in the first call along a dimension, later where it is seen.
        """
        error = refusal(lambda: self._check_len(x, dim, self.local_len, "this rank's part"))
        parts, terms, device_type = f"parts along {dim} of {self.place}", "", "cpu"
        if error is None:
            shape = [size for axis, size in enumerate(x.shape) if axis != dim % x.dim()]
            device_type = x.device.type
            terms = f"{parts}, {x.dtype} {shape} on {device_type}"
        agree(self.topology, parts, terms, error, device_type)
        return _Unshard.apply(x, self, dim)

    def plan(self, kv_sequence: "ShardedSequence | None" = None) -> "Plan":
        """What the queries of this sequence see of the keys of `kv_sequence` (default: of this
        one).
        """
        keys = kv_sequence or self
        if keys not in self._plans:
            how = self.topology.rings, self.topology.gather
            self._plans[keys] = Plan(self.ring_shards, keys.ring_shards, self._regions, *how)
        return self._plans[keys]

    @cached_property
    def place(self) -> str:
        """Itself in words that two ranks with different masks, layouts or exchanges will hardly
        share.
        """
        checksum = crc32(repr((self.mask, self.layout)).encode())
        return f"{self}, by {self.topology.exchange}, checksum {checksum}"

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardedSequence, (self.seq_len, self.topology, self.mask, self.layout)

    def __str__(self) -> str:
        return f"{self.seq_len} tokens, {self.layout} over {self.topology.size} ranks, {self.mask}"

    def _work(self, span: range) -> int:
        """Pairs that the queries at some positions see."""
        tiles = self._regions.tiles((span,), (range(self.seq_len),))
        return sum(tile.area for tile in tiles)

    def _check_len(self, x: Tensor, dim: int, length: int, what: str) -> None:
        if not isinstance(x, Tensor):
            raise ValueError(f"{what} must be a tensor; got {type(x)}")
        axis = whole_number("dim", dim)
        if not -x.dim() <= axis < x.dim() or x.shape[axis] != length:
            raise ValueError(
                f"{what} has {length} tokens along dimension {dim}; "
                f"got shape {tuple(x.shape)} ({self})"
            )


_NUMBERS = count()
_NUMBERED: WeakValueDictionary[int, ShardedSequence] = WeakValueDictionary()


def numbered(number: int) -> ShardedSequence:
    """The sequence with a number. Raises RuntimeError if nobody has kept it."""
    sequence = _NUMBERED.get(number)
    if sequence is None:
        raise RuntimeError("the sequence of this call is gone: keep it until the backward is done")
    return sequence


class _Shard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, sequence: ShardedSequence, dim: int) -> Tensor:
        ctx.place = sequence, dim  # type: ignore[attr-defined]
        return _take(x, sequence, dim)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _Unshard.apply(grads[0], *ctx.place), None, None  # type: ignore[attr-defined]


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, sequence: ShardedSequence, dim: int) -> Tensor:
        ctx.place = sequence, dim  # type: ignore[attr-defined]
        return _gather(x, sequence, dim)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _Shard.apply(grads[0], *ctx.place), None, None  # type: ignore[attr-defined]


def _take(x: Tensor, sequence: ShardedSequence, dim: int) -> Tensor:
    spans = sequence.shards[sequence.topology.rank]
    index: list[slice] = [slice(None)] * (dim % x.dim())
    return torch.cat([x[(*index, slice(span.start, span.stop, span.step))] for span in spans], dim)


def _gather(x: Tensor, sequence: ShardedSequence, dim: int) -> Tensor:
    """Ranks may hold one token more or less: they send the longest length and drop the rest."""
    if sequence.topology.size == 1:
        return x.clone()
    lens, dim = sequence.lens, dim % x.dim()
    longest = max(lens)
    sent = x.transpose(0, dim)
    sent = torch.cat([sent, sent.new_zeros(longest - sent.shape[0], *sent.shape[1:])])
    parts = [torch.empty_like(sent) for _ in lens]
    dist.all_gather(parts, sent.contiguous(), group=sequence.topology.group)
    whole = x.new_empty(sequence.seq_len, *sent.shape[1:])
    for part, length, shard in zip(parts, lens, sequence.shards, strict=True):
        whole[positions(shard, x.device)] = part[:length]
    return whole.transpose(0, dim)
