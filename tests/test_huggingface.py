"""Models of Hugging Face over a ring are those of one process."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from conftest import World
from ranks import groups, raised
from ringed import relative
from torch import Tensor, nn

pytest.importorskip("transformers")
from hf_models import Batch, Case, batch, built, exact, gradients, labelled, stock
from transformers import AttentionInterface

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
        (2, Case("Qwen2Moe")),
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


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2", "GptOss"])
def test_local_attention_keeps_what_the_ring_does(family: str) -> None:
    model, tokens = built(Case(family)), batch(Case(family), 0)["input_ids"]
    use_ring_attention(model)
    with exact():
        part = HuggingFaceRing(ProcessGroupManager.build()).batch({"input_ids": tokens})
        ringed = model(**part.inputs).logits
        with local_attention(model):
            assert relative(model(tokens).logits, ringed) < 1e-11


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "GptOss"])
def test_autocast_rules_attention_as_it_does_locally(family: str) -> None:
    model, given = built(Case(family)).float(), batch(Case(family), 0)
    exactly = model(given["input_ids"], use_cache=False).logits
    found = []
    for attention in ("eager", "ring_sp"):
        register()
        model.set_attn_implementation(attention)
        inputs = HuggingFaceRing(ProcessGroupManager.build()).batch(given).inputs
        inputs = {"input_ids": given["input_ids"]} if attention == "eager" else inputs
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**inputs).logits
        logits.float().square().mean().backward()
        gradients(model)
        found.append(relative(logits.float(), exactly))
    assert found[1] < 2 * found[0]


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
