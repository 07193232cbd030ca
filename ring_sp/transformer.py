"""A decoder over a sharded sequence, for those without a host framework; see `modules`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from ring_sp.blockwise import blockwise
from ring_sp.checkpointing import Checkpointing, checkpoint
from ring_sp.layout import whole_number
from ring_sp.linear_loss import LinearLoss, linear_cross_entropy
from ring_sp.masks import Mask
from ring_sp.modules import AttentionConfig, RingAttention, Sequences
from ring_sp.offload import Offload
from ring_sp.replicated import called_with, replicated
from ring_sp.rotary import Rotation, rotation
from ring_sp.sequence import ShardedSequence
from ring_sp.tokenwise import RMSNorm, swiglu
from ring_sp.topology import Topology


@dataclass(frozen=True)
class Saving:
    """How a `RingTransformer` saves memory; its results are the same to rounding.

    `checkpointing` None keeps all that layers compute; `feed_forward_chunk` and `loss_chunk` are
    the tokens of which the feed-forward's inside, or logits, are held at a time: all, and as many
    as `linear_loss.LOGITS`, by default. Raises ValueError for a number below 1.
    """

    checkpointing: Checkpointing | None = None
    feed_forward_chunk: int | None = None
    loss_chunk: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.checkpointing, Checkpointing | None):
            raise ValueError(f"checkpointing must be a Checkpointing; got {self.checkpointing!r}")
        chunk = self.feed_forward_chunk
        if chunk is not None and whole_number("feed_forward_chunk", chunk) < 1:
            raise ValueError(f"chunk is a number of tokens, at least 1; got {self}")
        LinearLoss(chunk=self.loss_chunk)


class RingTransformer(nn.Module):
    """A decoder-only language model: RMSNorm before rotary attention and before SwiGLU."""

    def __init__(
        self,
        vocab_size: int,
        depth: int,
        attention: AttentionConfig,
        ff_multiple: float = 3,
        tied: bool = True,
        topology: Topology | None = None,
        mask: Mask | None = None,
        layout: str = "zigzag",
        **saving: Any,
    ) -> None:
        """The feed-forward is ff_multiple * dim wide, rounded; a `tied` head is the embedding's
        weight. `saving` is `checkpointing`, `feed_forward_chunk` and `loss_chunk`, see `Saving`.
        """
        super().__init__()
        self.saving = Saving(**saving)
        saved = self.saving.checkpointing
        self.offload = Offload() if saved and saved.offload else None
        dim, self.config = attention.dim, attention
        self.sequences = Sequences(topology or Topology(), mask, layout)
        self.embedding = nn.Embedding(vocab_size, dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(
            _Block(
                RingAttention(attention, topology, mask, layout),
                round(ff_multiple * dim),
                self.saving.feed_forward_chunk,
            )
            for _ in range(depth)
        )
        self.norm = RMSNorm(dim, eps=1e-5)
        self.head = None if tied else nn.Linear(dim, vocab_size, bias=False)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        *,
        sequence: ShardedSequence | None = None,
        mask: Mask | None = None,
    ) -> Tensor:
        """Without `sequence`, tokens [B, S] are whole and equal on every rank, and so are the
        logits [B, S, vocab]; `mask` replaces the module's own. With it, tokens are this rank's part
        [B, local_len], and so are the logits; the mask is the sequence's.

        With `labels`, from `loss.shift_labels` of the whole tokens and cut as tokens are: the mean
        loss over all tokens of the sequence whose label is not IGNORE, the same on every rank.
        Collective over the topology. Raises ValueError, before any communication, for input that
        does not fit.
        """
        for name, given in (("tokens", tokens), ("labels", tokens if labels is None else labels)):
            if given.dim() != 2 or given.shape != tokens.shape or given.dtype.is_floating_point:
                raise ValueError(
                    f"{name} must be integers [batch, tokens], labels one for each token; got "
                    f"{given.dtype} {tuple(given.shape)} with tokens {tuple(tokens.shape)}"
                )
        tokens, place = self.sequences.part(tokens, sequence, mask)
        if labels is not None and sequence is None:
            labels = place.shard(labels)
        out = replicated(self.sequences.topology, self, self.local, tokens, labels, place)
        return place.unshard(out) if labels is None and sequence is None else out

    def local(self, tokens: Tensor, labels: Tensor | None, sequence: ShardedSequence) -> Tensor:
        """`forward` of this rank's part, for a trainer that sums gradients itself: the parameters
        get this rank's share, of the mean over all ranks. Collective over the topology.
        """
        x = self.embedding(tokens.long())
        turn = rotation(sequence, x, self.config.head_size, self.config.rotary_base)
        layers = [partial(block, sequence=sequence, turn=turn) for block in self.blocks]
        saved = self.saving.checkpointing
        for start in range(0, len(layers), saved.every if saved else 1):
            if saved is None:
                x = layers[start](x)
            else:
                stretch = partial(_in_turn, layers[start : start + saved.every])
                kept = saved.keep_attention
                x = checkpoint(stretch, x, keep_attention=kept, offload=self.offload)
        if self.offload:
            self.offload.settle()
        x, weight = self.norm(x), (self.head or self.embedding).weight
        if labels is None:
            return functional.linear(x, weight)
        group = sequence.topology.group if sequence.topology.size > 1 else None
        options = LinearLoss(chunk=self.saving.loss_chunk)
        return linear_cross_entropy(x, weight, labels.long(), group=group, options=options)


def _in_turn(layers: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


class _Block(nn.Module):
    def __init__(self, attention: RingAttention, width: int, chunk: int | None) -> None:
        super().__init__()
        self.chunk = chunk
        dim = attention.config.dim
        self.attention_norm = RMSNorm(dim, eps=1e-5)
        self.attention = attention
        self.feed_forward_norm = RMSNorm(dim, eps=1e-5)
        self.up = nn.Linear(dim, 2 * width, bias=False)
        self.down = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor, sequence: ShardedSequence, turn: Rotation | None) -> Tensor:
        part = self.attention_norm(x), sequence
        x = x + self.attention.attend(part, part, turn)
        if self.chunk is None:
            return self._feed(x)
        own = {n: w for n, w in self.named_parameters() if not n.startswith("attention")}

        def feed(part: Tensor, *weights: Tensor) -> Tensor:
            return called_with(dict(zip(own, weights, strict=True)), self, self._feed, part)

        return blockwise(feed, x, self.chunk, weights=tuple(own.values()))

    def _feed(self, x: Tensor) -> Tensor:
        return x + self.down(swiglu(self.up(self.feed_forward_norm(x))))
