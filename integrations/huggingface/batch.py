"""A whole batch of Hugging Face's collators, and a rank's part of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ring_sp import ShardedSequence, masks
from ring_sp.loss import IGNORE, shift_labels
from ring_sp.masks import Mask

KEYS = (
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "labels",
    "shift_labels",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "seq_idx",
)
"""What a batch may have; the last three say nothing that cu_seq_lens_q does not."""


@dataclass(frozen=True)
class RingBatch:
    """A rank's part of a batch."""

    inputs: dict[str, Any]
    """Arguments of the model: its tokens, position_ids, and `ring_sp`, the sequence's context."""
    shift_labels: Tensor | None
    """The next token of each of this rank's tokens, [B, local_len]; None without labels."""
    sequence: ShardedSequence


@dataclass(frozen=True)
class WholeBatch:
    """A batch that was found to make sense."""

    name: str
    """The key of `tokens`."""
    tokens: Tensor
    positions: Tensor
    labels: Tensor | None
    mask: Mask

    @property
    def seq_len(self) -> int:
        return self.tokens.shape[1]

    @classmethod
    def read(cls, batch: Mapping[str, Any], inner: Mask | None) -> "WholeBatch":
        """See `HuggingFaceRing.batch`. Waits for the device where the batch is on one."""
        given = {key: value for key, value in batch.items() if value is not None}
        name = _checked(given)
        tokens = given[name]
        positions = given.get("position_ids")
        cuts = _cuts(given, tokens.shape[0])
        if "attention_mask" in given:
            _require_right_padding(given, cuts, inner)
            cuts = None
        if positions is None:
            positions = _positions(cuts, tokens)
        labels = given.get("shift_labels")
        if labels is None and "labels" in given:
            labels = shift_labels(given["labels"], cuts)
        mask = inner or masks.causal()
        return cls(name, tokens, positions, labels, masks.documents(cuts, mask) if cuts else mask)

    def cut(self, sequence: ShardedSequence, context: object) -> RingBatch:
        """The part of this rank; `context` travels with it."""
        inputs = {
            self.name: sequence.shard(self.tokens),
            "position_ids": sequence.shard(self.positions),
            "use_cache": False,
            "ring_sp": context,
        }
        labels = None if self.labels is None else sequence.shard(self.labels)
        return RingBatch(inputs, labels, sequence)


def _checked(given: Mapping[str, Any]) -> str:
    """The key of the tokens. Raises ValueError for keys or shapes that do not fit."""
    if unknown := sorted(given.keys() - set(KEYS)):
        raise ValueError(
            f"a ring cuts {', '.join(KEYS)} along the sequence, and does not know how to cut "
            f"{', '.join(unknown)}: take them out of the batch"
        )
    names = [name for name in ("input_ids", "inputs_embeds") if name in given]
    if len(names) != 1:
        raise ValueError(f"the batch needs input_ids or inputs_embeds, one of them; got {names}")
    tokens = given[names[0]]
    if tokens.dim() != (2 if names[0] == "input_ids" else 3):
        raise ValueError(
            f"input_ids are [B, S] and inputs_embeds [B, S, E]; got {tuple(tokens.shape)}"
        )
    rows, seq_len = tokens.shape[:2]
    for key in ("attention_mask", "position_ids", "labels", "shift_labels"):
        shape = tuple(given[key].shape) if key in given else (rows, seq_len)
        if key == "attention_mask" and len(shape) == 4:
            raise NotImplementedError(
                "a ring takes no 4-D attention mask: give attention_mask [B, S] with padding on "
                "the right, and say masks other than causal with ring.batch(inner=masks...)"
            )
        if shape != (rows, seq_len) and not (key == "position_ids" and shape == (1, seq_len)):
            raise ValueError(f"{key} must be [{rows}, {seq_len}] as the tokens are; got {shape}")
    return names[0]


def _cuts(given: Mapping[str, Any], rows: int) -> list[int] | None:
    """Where packed documents begin and end, from 0; None where there is one."""
    cuts = given.get("cu_seq_lens_q")
    if cuts is not None:
        keys = given.get("cu_seq_lens_k", cuts)
        if rows != 1 or not torch.equal(cuts, keys):
            raise ValueError(
                f"documents with cu_seq_lens_q are packed into one row, queries and keys alike; "
                f"got {rows} rows and cu_seq_lens_k {keys.tolist()[:8]}. Flatten the batch."
            )
        return [int(cut) for cut in cuts.tolist()]
    positions = given.get("position_ids")
    if positions is None:
        if "seq_idx" in given:
            raise ValueError("seq_idx says nothing of positions: give cu_seq_lens_q besides")
        return None
    starts = positions.diff(dim=1) != 1
    if "attention_mask" in given:
        starts = starts & given["attention_mask"].bool()[:, 1:]
    if not bool((starts == starts[:1]).all()):
        raise ValueError(
            "position_ids start again in other places in each row, and all rows of a ring share "
            "one mask: flatten the batch into one row, or use one row a batch"
        )
    inside = (starts[0].nonzero().flatten() + 1).tolist()
    return [0, *inside, positions.shape[1]] if inside else None


def _require_right_padding(
    given: Mapping[str, Any], cuts: list[int] | None, inner: Mask | None
) -> None:
    """Causal attention needs no mask where padding comes last: no token sees it, and it has no
    loss.
    """
    real = given["attention_mask"].bool()
    if bool(real.all()):
        if cuts is None:
            return
    elif bool((real[:, 1:] & ~real[:, :-1]).any()) or not bool(real[:, 0].all()):
        raise ValueError(
            "a ring needs the padding of attention_mask on the right of each row, after a token at "
            "least: tokenizer.padding_side = 'right'"
        )
    if cuts is not None:
        raise ValueError(
            "position_ids that start again or cu_seq_lens_q mean packed documents, which have no "
            "attention_mask: leave it out"
        )
    if inner is not None:
        raise NotImplementedError(
            f"padded rows need causal attention, in which no token sees what follows; got "
            f"inner={inner}. Pack the rows as documents instead."
        )
    for key in ("labels", "shift_labels"):
        if key in given and bool((given[key][~real] != IGNORE).any()):
            raise ValueError(f"{key} must be {IGNORE} where attention_mask is 0")


def _positions(cuts: list[int] | None, tokens: Tensor) -> Tensor:
    """[1, S], from 0 in each document."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    if cuts:
        starts = torch.tensor(cuts, device=tokens.device)
        positions = positions - starts[torch.searchsorted(starts, positions, right=True) - 1]
    return positions[None]
