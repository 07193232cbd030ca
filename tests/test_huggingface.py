"""Models of Hugging Face over a ring are those of one process."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import World
from ranks import groups, raised
from ringed import relative
from torch import Tensor, nn

pytest.importorskip("transformers")
from hf_models import VOCAB, Batch, Case, batch, built, exact, gradients, labelled, stock
from transformers import AttentionInterface, Qwen3NextConfig
from transformers.masking_utils import create_causal_mask

from ring_sp import ProcessGroupManager, masks
from ring_sp.integrations.huggingface import (
    HuggingFaceRing,
    local_attention,
    register,
    use_ring_attention,
)

CUTS = (0, 9, 10, 27)


def packed(family: str, ring: int, layout: str) -> Case:
    return Case(family, ring, layout=layout, rows=1, cuts=CUTS)


def errors(case: Case, whole: tuple[list[Tensor], Tensor, Batch]) -> list[tuple[float, str]]:
    """How far this rank's logits and loss, and the gradients summed over ranks, are from those of
    one process; worst first.
    """
    manager = groups(ring=case.ring // case.ulysses, ulysses=case.ulysses)
    ring, data_rank = HuggingFaceRing(manager, case.layout), manager.rank("data")
    given = batch(case, data_rank)
    with exact():
        model = built(case)
        use_ring_attention(model)
        part = ring.batch(given)
        assert part.shift_labels is not None
        logits = model(**part.inputs).logits
        loss = ring.loss(logits, part.shift_labels)
        loss.backward()
    wanted = part.sequence.shard(whole[0][data_rank])
    if "attention_mask" in given:
        real = part.sequence.shard(given["attention_mask"])[..., None]
        logits, wanted = logits * real, wanted * real
    found = [(relative(logits, wanted), "logits"), (relative(loss, whole[1]), "loss")]
    for name, gradient in gradients(model).items():
        dist.all_reduce(gradient)
        found.append((relative(gradient, whole[2][name]), name))
    return sorted(found, reverse=True)


@pytest.mark.parametrize(
    ("size", "case"),
    [
        (2, Case("Llama")),
        (2, Case("GptOss", layout="striped")),
        (4, Case("Llama", layout="contiguous")),
        (4, Case("Llama", ring=4, layout="striped")),
        (4, Case("Llama", ring=4, ulysses=2, checkpointing=True)),
        (4, Case("Qwen3")),
        (4, Case("Qwen3", ring=4, layout="contiguous")),
        (4, Case("Mistral", ring=4)),
        (4, Case("Mistral", layout="striped", padded=True)),
        (4, Case("Gemma2")),
        (4, Case("Gemma2", ring=4, layout="striped")),
        (4, packed("Gemma2", 4, "contiguous")),
        (4, Case("GptOss", ring=4)),
        (4, packed("GptOss", 2, "zigzag")),
        (4, packed("Qwen3", 4, "balanced")),
        (4, Case("Qwen3", ring=4, padded=True, seq_len=32)),
    ],
    ids=str,
)
def test_a_model_over_a_ring_equals_one_process(
    world: Callable[[int], World], size: int, case: Case
) -> None:
    whole = world(1).run(stock, case, size // case.ring)[0]
    for worst, *_ in world(size).run(errors, case, whole):
        assert worst[0] < 1e-11, worst


def stepped(case: Case, seed: int) -> tuple[Tensor, Batch]:
    """The loss of one data rank with dropout, and its gradients summed over the ring."""
    manager = groups(ring=case.ring)
    ring = HuggingFaceRing(manager, case.layout)
    with exact():
        model = built(case)
        use_ring_attention(model)
        part = ring.batch(batch(case, 0), dropout_seed=seed)
        assert part.shift_labels is not None
        loss = ring.loss(model(**part.inputs).logits, part.shift_labels)
        loss.backward()
    found = gradients(model)
    if dist.get_world_size() > 1:
        for gradient in found.values():
            dist.all_reduce(gradient)
    return loss.detach(), found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_does_not_depend_on_the_ring(
    world: Callable[[int], World], checkpointing: bool
) -> None:
    kept = Case("Mistral", 4, checkpointing=checkpointing, dropout=0.3)
    alone, again, other = (
        world(1).run(stepped, Case("Mistral", 1, dropout=0.3), seed)[0] for seed in (7, 7, 8)
    )
    assert torch.equal(alone[0], again[0]) and abs(alone[0] - other[0]) > 1e-3
    for loss, found in world(4).run(stepped, kept, 7):
        assert relative(loss, alone[0]) < 1e-11
        assert max(relative(found[name], x) for name, x in alone[1].items()) < 1e-11


def seeds(sizes: dict[str, int]) -> list[int]:
    """Of two layers in two steps."""
    ring = HuggingFaceRing(groups(**sizes))
    tokens = {"input_ids": torch.arange(8)[None]}
    layers = [nn.Module(), nn.Module()]
    for number, layer in enumerate(layers):
        layer.layer_idx = number  # type: ignore[assignment]
    contexts = [ring.batch(tokens, dropout_seed=step).inputs["ring_sp"] for step in (3, 4)]
    return [context.seed(layer) for context in contexts for layer in layers]


def test_each_layer_step_and_data_rank_drops_by_a_seed_of_its_own(
    world: Callable[[int], World],
) -> None:
    data = world(2).run(seeds, {})
    assert len({seed for found in data for seed in found}) == 8
    shared = world(2).run(seeds, {"ring": 2})
    assert shared == [data[0]] * 2


def averaged(case: Case) -> list[tuple[float, str]]:
    """Two batches accumulated under DDP, which averages gradients over all ranks: how far they are
    from the gradients of both batches in one process.
    """
    manager = groups(ring=case.ring)
    ring = HuggingFaceRing(manager, case.layout)
    count = torch.tensor(labelled(case, 2))
    with exact():
        plain = built(case)
        use_ring_attention(plain)
        model = nn.parallel.DistributedDataParallel(plain)
        for number in range(2):
            part = ring.batch(batch(case, number))
            assert part.shift_labels is not None
            loss = ring.loss(model(**part.inputs).logits, part.shift_labels, 4, count)
            loss.backward()
        found = gradients(plain)
        wanted = stock(case, 2)[2]
    return sorted(((relative(found[name], x), name) for name, x in wanted.items()), reverse=True)


def test_gradients_that_ddp_averages_and_accumulates_are_exact(
    world: Callable[[int], World],
) -> None:
    for worst, *_ in world(4).run(averaged, Case("Llama", 4)):
        assert worst[0] < 1e-11, worst


def test_evaluation_and_generation_are_local_only_where_asked() -> None:
    case = Case("Llama")
    tokens = batch(case, 0)["input_ids"]
    model, wanted = built(case).eval(), built(case).eval()
    use_ring_attention(model)
    assert "local_attention" in raised(model, tokens)
    with local_attention(model, "eager"):
        assert torch.equal(model(tokens).logits, wanted(tokens).logits)
        more, same = (
            x.generate(tokens, max_new_tokens=4, do_sample=False) for x in (model, wanted)
        )
    assert torch.equal(more, same) and more.shape[1] == tokens.shape[1] + 4
    assert "needs the batch's sequence" in raised(model, tokens)


def test_a_second_registration_changes_nothing() -> None:
    made = register()
    assert register() == made
    assert AttentionInterface()["ring_sp"] is made.attention


def test_packed_documents_are_read_from_positions_or_cuts() -> None:
    ring = HuggingFaceRing(ProcessGroupManager.build())
    given = batch(packed("Llama", 1, "zigzag"), 0)
    given["labels"] = given["input_ids"]
    by_positions = ring.batch(given)
    positions = given.pop("position_ids")
    by_cuts = ring.batch({**given, "cu_seq_lens_q": torch.tensor(CUTS), "max_length_q": 17})
    assert by_positions.sequence.mask == masks.documents(CUTS) == by_cuts.sequence.mask
    assert torch.equal(by_cuts.inputs["position_ids"], positions)
    assert by_cuts.shift_labels is not None and by_positions.shift_labels is not None
    assert torch.equal(by_cuts.shift_labels, by_positions.shift_labels)
    assert by_cuts.shift_labels[0, [8, 9, 26]].tolist() == [-100] * 3
    shifted = {**given, "shift_labels": by_cuts.shift_labels}
    del shifted["labels"]
    assert torch.equal(ring.batch(shifted).shift_labels, by_cuts.shift_labels)  # type: ignore[arg-type]


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
