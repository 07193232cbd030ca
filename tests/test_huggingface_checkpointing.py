"""A Hugging Face model that recomputes its layers, and not its attention."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import World
from ranks import groups
from ringed import ring_passes

pytest.importorskip("transformers")
from hf_models import Case, batch, built
from torch import Tensor

from ring_sp import attention_kept
from ring_sp.integrations.huggingface import HuggingFaceRing, use_blockwise, use_ring_attention

LAYERS = 2
OPTIONS: dict[str, tuple[int, dict[str, Any] | None]] = {
    "nothing": (0, None),
    "full": (LAYERS, {"use_reentrant": False}),
    "kept": (0, {"use_reentrant": False, "context_fn": attention_kept}),
}
"""Passes round the ring that are made again, and arguments."""


def results(case: Case, again: dict[str, Any] | None, chunk: int | None) -> list[Tensor]:
    """Passes round the ring in forward and backward, loss and gradients."""
    ring, model = HuggingFaceRing(groups(ring=case.ring), case.layout), built(case)
    use_ring_attention(model)
    if chunk:
        use_blockwise(model, chunk)
    if again is not None:
        model.gradient_checkpointing_enable(again)
    part = ring.batch(batch(case, 0), dropout_seed=1)
    with ring_passes() as passes:
        loss = ring.loss(model(**part.inputs).logits, part.shift_labels)
        grads = torch.autograd.grad(loss, list(model.parameters()))
    return [torch.tensor(passes.call_count), loss.detach(), *grads]


def found(case: Case, chunk: int | None) -> dict[str, list[Tensor]]:
    return {name: results(case, again, chunk) for name, (_, again) in OPTIONS.items()}


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("case", [Case("Llama"), Case("Gemma2"), Case("Qwen3", dropout=0.3)])
def test_layers_are_computed_again_and_attention_is_not(
    world: Callable[[int], World], case: Case, chunk: int | None
) -> None:
    for rank in world(2).run(found, case, chunk):
        for name, (again, _) in OPTIONS.items():
            count, *rest = rank[name]
            assert count == 2 * LAYERS + again
            assert all(map(torch.equal, rest, rank["nothing"][1:]))
