"""Attention over sharded sequences with its projections, for those without a host framework.

Modules here and in `transformer` shard a whole sequence themselves, or take this rank's part and
the sequence that it is part of. Either way every rank of the topology gets the whole gradient of
every parameter, as one process would; a plain optimizer, or DistributedDataParallel over the world,
goes on from there. Parameters must start equal: seed every rank alike, or load a state_dict, which
is the same for any topology.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ring_sp import masks
from ring_sp.attention import ring_attention
from ring_sp.masks import Mask
from ring_sp.replicated import replicated
from ring_sp.rotary import Rotation, rotate, rotation
from ring_sp.sequence import ShardedSequence
from ring_sp.topology import Topology
from ring_sp.ulysses import kv_replication

KEPT_SEQUENCES = 8
"""Sequences that a module remembers: more lengths and masks than most training alternates."""

Part = tuple[Tensor, ShardedSequence]
"""This rank's tokens [B, local_len, ...], and the sequence whose part they are."""


@dataclass(frozen=True)
class AttentionConfig:
    """`num_kv_heads` defaults to num_heads, `head_dim` to dim // num_heads; `rotary_base` None is
    no rotary embedding; the last three go to `ring_attention`. Raises ValueError for sizes that do
    not fit.
    """

    dim: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    bias: bool = False
    rotary_base: float | None = 10000.0
    scale: float | None = None
    softcap: float | None = None
    kernel: str = "auto"

    def __post_init__(self) -> None:
        sizes = (self.dim, self.num_heads, self.num_kv_heads, self.head_dim)
        if any(size is not None and size < 1 for size in sizes):
            raise ValueError(f"sizes must be at least 1; got {self}")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads; got {self}")
        if self.head_dim is None and self.dim % self.num_heads:
            raise ValueError(f"num_heads must divide dim, or give head_dim; got {self}")
        if self.rotary_base is not None and self.head_size % 2:
            raise ValueError(f"rotary needs an even head_dim, or rotary_base=None; got {self}")

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.dim // self.num_heads


class RingAttention(nn.Module):
    """Multi-head attention with its projections, and rotary embedding by global position."""

    def __init__(
        self,
        config: AttentionConfig,
        topology: Topology | None = None,
        mask: Mask | None = None,
        layout: str = "zigzag",
    ) -> None:
        """`topology` defaults to one rank, `mask` to causal. Raises ValueError for heads that the
        Ulysses ranks do not divide.
        """
        super().__init__()
        self.config = config
        self.sequences = Sequences(topology or Topology(), mask, layout)
        kv_replication(config.num_heads, config.kv_heads, self.sequences.topology.ulysses.size)
        q_dim, kv_dim = (n * config.head_size for n in (config.num_heads, config.kv_heads))
        self.wq = nn.Linear(config.dim, q_dim, config.bias)
        self.wk = nn.Linear(config.dim, kv_dim, config.bias)
        self.wv = nn.Linear(config.dim, kv_dim, config.bias)
        self.wo = nn.Linear(q_dim, config.dim, config.bias)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        sequence: ShardedSequence | None = None,
        context_sequence: ShardedSequence | None = None,
        mask: Mask | None = None,
    ) -> Tensor:
        """Without `sequence`, x [B, S, dim] is whole and equal on every rank, and so are the result
        and the gradient of x; `mask` replaces the module's own. With it, x is this rank's part [B,
        local_len, dim], and so is the result; the mask is the sequence's.

        `context` [B, Sc, dim], whole or with its `context_sequence` just as x is, gives keys and
        values: cross attention, without rotary embedding. The mask then rules over the positions of
        both, and is mostly `masks.full()`. Collective over the topology. Raises ValueError, before
        any communication, for input that does not fit.
        """
        for name, given in (("x", x), ("context", x if context is None else context)):
            if given.dim() != 3 or given.shape[::2] != (x.shape[0], self.config.dim):
                need = f"[batch, tokens, {self.config.dim}], of one batch size"
                raise ValueError(f"{name} must be {need}; got shape {tuple(given.shape)}")
        if (context_sequence is None) != (context is None or sequence is None):
            came = f"{sequence} and {context_sequence}"
            raise ValueError(f"x and context must both be whole or both be sharded; got {came}")
        queries = keys = self.sequences.part(x, sequence, mask)
        turn = rotation(queries[1], x, self.config.head_size, self.config.rotary_base)
        if context is not None:
            unruled = None if context_sequence else masks.causal()  # the queries' mask rules
            keys, turn = self.sequences.part(context, context_sequence, unruled), None
        out = replicated(self.sequences.topology, self, self.attend, queries, keys, turn)
        return queries[1].unshard(out) if sequence is None else out

    def attend(self, queries: Part, keys: Part, turn: Rotation | None) -> Tensor:
        """`forward` of this rank's part, for a module that sums gradients itself: the parameters
        get this rank's share. `keys` is `queries` but for cross attention; `turn` is from `rotary`.
        """
        (x, sequence), (source, kv_sequence), config = queries, keys, self.config
        q, k, v = (
            projected.unflatten(-1, (-1, config.head_size))
            for projected in (self.wq(x), self.wk(source), self.wv(source))
        )
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        options: dict[str, Any] = {"scale": config.scale, "softcap": config.softcap}
        out = ring_attention(q, k, v, sequence, kv_sequence, kernel=config.kernel, **options)
        return self.wo(out.flatten(2))


class Sequences:
    """Where the sequences of a module live; remembers the last few, with tiles and agreements."""

    def __init__(self, topology: Topology, mask: Mask | None, layout: str) -> None:
        self.topology, self.layout = topology, layout
        self.mask = masks.causal() if mask is None else mask
        size = topology.size if isinstance(topology, Topology) else 1
        ShardedSequence(size, topology, layout=layout)  # refuses what is not known
        if not isinstance(self.mask, Mask):
            raise ValueError(f"mask must be a mask, such as masks.causal(); got {mask!r}")
        self._kept: dict[tuple[int, Mask], ShardedSequence] = {}

    def part(self, x: Tensor, sequence: ShardedSequence | None, mask: Mask | None) -> Part:
        """This rank's part of x [B, tokens, ...], which is whole unless its `sequence` is given.
        Raises ValueError for a sequence that does not fit.
        """
        if sequence is not None and not isinstance(sequence, ShardedSequence):
            raise ValueError(f"sequence must be a ShardedSequence; got {type(sequence)}")
        if sequence is None:
            sequence = self._of(x.shape[1], self.mask if mask is None else mask)
            return sequence.shard(x), sequence
        for met, need in (
            (mask is None, f"a sharded call has the mask of its sequence, not {mask} too"),
            (sequence.topology == self.topology, "sequence and module need the same topology"),
            (x.shape[1] == sequence.local_len, f"pass {sequence.local_len} tokens, sequence.shard"),
        ):
            if not met:
                raise ValueError(f"{need}; got shape {tuple(x.shape)}, sequence of {sequence}")
        return x, sequence

    def _of(self, seq_len: int, mask: Mask) -> ShardedSequence:
        key = seq_len, mask
        known = self._kept.pop(key, None)
        self._kept[key] = known or ShardedSequence(seq_len, self.topology, mask, self.layout)
        if len(self._kept) > KEPT_SEQUENCES:
            del self._kept[next(iter(self._kept))]
        return self._kept[key]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Sequences":
        """Itself: only facts, and process groups, which cannot be copied."""
        return self
