"""What of Hugging Face no ring can do, refused by name."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from ranks import raised
from torch import nn

pytest.importorskip("transformers")
from hf_models import SHAPE, VOCAB, Case, batch, built
from transformers import Qwen3NextConfig, RobertaConfig, RobertaForCausalLM
from transformers.masking_utils import create_causal_mask

from ring_sp import ProcessGroupManager, masks
from ring_sp.integrations.huggingface import HuggingFaceRing, use_ring_attention


def test_a_batch_that_no_ring_can_cut_is_refused_by_name() -> None:
    ring = HuggingFaceRing(ProcessGroupManager.build())
    tokens = torch.arange(1, 9).view(2, 4)
    real = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    starts = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 2]])
    cuts = torch.tensor([0, 4])
    refused: list[tuple[Mapping[str, Any], str]] = [
        ({"pixel_values": tokens}, "does not know how to cut pixel_values"),
        ({"inputs_embeds": tokens[..., None]}, "one of them; got"),
        ({"input_ids": tokens[0]}, "are [B, S]"),
        ({"labels": tokens[:, :3]}, "labels must be [2, 4]"),
        ({"position_ids": tokens[None]}, "position_ids must be [2, 4]"),
        ({"position_ids": starts}, "other places in each row"),
        ({"cu_seq_lens_q": cuts}, "packed into one row"),
        ({"seq_idx": tokens}, "give cu_seq_lens_q besides"),
        ({"attention_mask": real[:, None, None]}, "no 4-D attention mask"),
        ({"attention_mask": real.flip(1)}, "padding_side = 'right'"),
        ({"attention_mask": 1 - real}, "padding_side = 'right'"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1]] * 2)}, "padding_side = 'right'"),
        ({"attention_mask": real, "labels": tokens}, "labels must be -100"),
        (
            {"attention_mask": torch.ones_like(real), "position_ids": starts[:1]},
            "which have no attention_mask",
        ),
    ]
    for extra, message in refused:
        assert message in raised(ring.batch, {"input_ids": tokens, **extra})
    padded = {"input_ids": tokens, "attention_mask": real}
    assert "need causal attention" in raised(ring.batch, padded, inner=masks.full())
    restarted = {**padded, "position_ids": (real.cumsum(1) - 1).masked_fill(real == 0, 1)}
    assert ring.batch(restarted).sequence.mask == masks.causal()
    logits = torch.zeros(2, 1, VOCAB)
    assert "logits_to_keep" in raised(ring.loss, logits, tokens)


def test_a_call_that_cannot_ring_is_refused_by_name() -> None:
    ring = HuggingFaceRing(ProcessGroupManager.build())
    case = Case("Gemma2", dropout=0.1)
    given = batch(case, 0)
    del given["labels"]
    model = built(case)
    use_ring_attention(model)
    inputs = ring.batch(given).inputs
    square = torch.zeros(2, 1, 27, 27)
    refused: list[tuple[Mapping[str, Any], str]] = [
        ({}, "dropout_seed=step"),
        ({"attention_mask": square}, "got an attention mask (2, 1, 27, 27)"),
        ({"attention_mask": torch.ones(2, 27)}, "to ring.batch and not to the model"),
        ({"cu_seq_lens_q": torch.tensor([0, 27])}, "give cu_seq_lens_q to ring.batch"),
        ({"position_bias": square}, "no position_bias"),
        ({"is_causal": False}, "bidirectional and has a sliding window"),
        ({"ring_sp": ring.batch(given, masks.prefix_lm(3)).inputs["ring_sp"]}, "cannot narrow"),
    ]
    for extra, message in refused:
        assert message in raised(model, **{**inputs, **extra})
    balanced = HuggingFaceRing(ProcessGroupManager.build(), "balanced").batch(given, dropout_seed=1)
    assert "balanced layout follows the mask" in raised(model, **balanced.inputs)
    plain = built(Case("Llama"))
    use_ring_attention(plain)
    assert "inner=masks.full()" in raised(plain, **inputs, is_causal=False)
    short = {"input_ids": inputs["input_ids"][:, :9], "position_ids": None}
    assert "27" in raised(plain, **{**inputs, **short})
    both = ring.batch(given, masks.full()).inputs
    assert torch.isfinite(plain(**both, is_causal=False).logits).all()


def test_a_model_that_cannot_ring_is_refused_by_name() -> None:
    model = built(Case("Llama"))
    ring = HuggingFaceRing(ProcessGroupManager.build())
    own = ring.batch({"input_ids": batch(Case(), 0)["input_ids"]}).inputs
    use_ring_attention(model)
    model.model.conv = nn.Conv1d(4, 4, 3)
    assert "has Conv1d (model.conv)" in raised(use_ring_attention, model)
    del model.model.conv
    shape: dict[str, Any] = {**SHAPE, "is_decoder": True}
    roberta = RobertaConfig(**shape)
    assert "positions from behind its padding" in raised(
        use_ring_attention, RobertaForCausalLM(roberta)
    )
    changes: list[tuple[str, Any, str]] = [
        ("layer_types", Qwen3NextConfig().layer_types, "no linear_attention layers"),
        ("layer_types", ["chunked_attention"], "no chunked_attention layers"),
        ("index_topk", 16, "sparse attention with an index"),
        ("is_encoder_decoder", True, "encoder and decoder"),
        ("rope_parameters", {"rope_type": "dynamic"}, "rope_type 'dynamic'"),
        ("rope_parameters", {"full_attention": {"rope_type": "longrope"}}, "rope_type 'longrope'"),
    ]
    for name, value, message in changes:
        before = getattr(model.config, name, None)
        setattr(model.config, name, value)
        assert message in raised(use_ring_attention, model)
        assert message in raised(model, **own), "before the first layer"
        setattr(model.config, name, before)
    assert model(**own).logits.shape == (2, 27, VOCAB)
    blocks: list[dict[str, Any]] = [
        {"block_sequence_ids": torch.zeros(2, 27, dtype=torch.int64)},
        {"or_mask_function": lambda _b, _h, q, k: q == k},
    ]
    for extra in blocks:
        states = torch.zeros(2, 27, 32)
        refused = raised(create_causal_mask, model.config, states, None, None, **extra)
        assert "adds to the causal mask by itself" in refused
