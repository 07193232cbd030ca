"""DeepSpeed's tiled computation around the parts of a Hugging Face model that need most memory.

A tile is computed anew in backward. DeepSpeed's TiledFusedLogitsLoss, which is not, leaves out of
the head's gradient any factor that comes after it (0.19: the one over accumulation steps too), so
that the loss here is SequenceTiledCompute's.
"""

from typing import Any

import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP, sequence_tiled_compute
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ring_sp.loss import IGNORE


class Tiled(nn.Module):
    """A feed-forward that takes `tiles` parts of its tokens [B, S, E] one after the other."""

    def __init__(self, inner: nn.Module, tiles: int) -> None:
        super().__init__()
        self.inner, self.tiles = inner, tiles

    def forward(self, x: Tensor) -> Tensor:
        weights = list(self.inner.parameters())
        out: Tensor = TiledMLP.apply(_call, self.inner, x, self.tiles, weights)
        return out


class TiledLoss(nn.Module):
    """A causal model whose result is the sum of the cross entropy over this rank's tokens, without
    their logits in memory at once.
    """

    def __init__(self, model: PreTrainedModel, tiles: int) -> None:
        """Puts `Tiled` around the feed-forwards of `model`, in place. Raises ValueError for a head
        that shares its weight, which ZeRO would reduce before all of its gradient is there.
        """
        super().__init__()
        head = model.get_output_embeddings()
        if head.weight is model.get_input_embeddings().weight:
            raise ValueError("a tiled loss needs a head of its own: tie_word_embeddings=False")
        self.model, self.tiles = model, tiles
        layers: Any = model.base_model.layers
        for layer in layers:
            layer.mlp = Tiled(layer.mlp, tiles)

    def forward(self, shift_labels: Tensor, **inputs: Any) -> Tensor:
        hidden = self.model.base_model(**inputs).last_hidden_state
        head = self.model.get_output_embeddings()
        total: Tensor = sequence_tiled_compute(
            _losses,
            hidden.shape[1],
            self.tiles,
            {"hidden": hidden, "labels": shift_labels},
            {"head": head},
            "hidden",
            list(head.parameters()),
            output_unshard_dimension=0,
            output_reduction="sum",
        )
        return total


def _call(module: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = module(x)
    return out


def _losses(hidden: Tensor, labels: Tensor, head: nn.Module) -> Tensor:
    wide = head(hidden).float().flatten(0, 1)
    return cross_entropy(wide, labels.flatten(), ignore_index=IGNORE, reduction="sum")


def mean_of(engine: Any, total: Tensor, labelled: Tensor | None) -> Tensor:
    """The mean over all ranks' tokens from this rank's sum."""
    whole = torch.ones(1, dtype=torch.bool, device=total.device)
    mean: Tensor = engine.ring.mean(total[None], whole, labelled)
    return mean
