"""A model with a chunked loss over a ring is the model of one process."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import World
from ranks import groups, raised
from ringed import relative

pytest.importorskip("transformers")
from hf_models import VOCAB, Batch, Case, batch, built, exact, gradients, stock
from torch import Tensor, nn

from ring_sp.integrations.huggingface import ChunkedLoss, HuggingFaceRing, use_ring_attention


def errors(case: Case, whole: tuple[list[Tensor], Tensor, Batch]) -> list[tuple[float, str]]:
    """How far loss and summed gradients are from those of one process, and the logits still."""
    ring = HuggingFaceRing(groups(ring=case.ring), case.layout)
    data_rank = ring.manager.rank("data")
    with exact():
        model = built(case)
        use_ring_attention(model)
        part = ring.batch(batch(case, data_rank))
        loss = ChunkedLoss(model, 5)(part.shift_labels, **part.inputs)
        loss.backward()
        found = gradients(model)
        logits = model(**part.inputs).logits
    wanted = part.sequence.shard(whole[0][data_rank])
    pairs = [(logits, wanted, "logits"), (loss, whole[1], "loss")]
    for name, gradient in found.items():
        dist.all_reduce(gradient)
        pairs.append((gradient, whole[2][name], name))
    return sorted(((relative(mine, true), name) for mine, true, name in pairs), reverse=True)


@pytest.mark.parametrize(
    ("size", "case"),
    [
        (2, Case("Llama")),
        (4, Case("Gemma2", layout="striped")),
        (4, Case("Qwen3", ring=4)),
        (4, Case("Mistral")),
        (4, Case("GptOss", ring=4)),
    ],
    ids=str,
)
def test_it_is_the_loss_of_whole_logits_in_one_process(
    world: Callable[[int], World], size: int, case: Case
) -> None:
    whole = world(1).run(stock, case, size // case.ring)[0]
    for worst, *_ in world(size).run(errors, case, whole):
        assert worst[0] < 1e-11, worst


def averaged() -> float:
    """How far DDP's averaged gradients are from summed ones, over data 2 x ring 2."""
    case, ring = Case("Llama"), HuggingFaceRing(groups(ring=2))
    part = ring.batch(batch(case, ring.manager.rank("data")))
    size, found = dist.get_world_size(), []
    for wrapped in (False, True):
        with exact():
            model: Any = built(case)
            use_ring_attention(model)
            called: Any = ChunkedLoss(model)
            called = nn.parallel.DistributedDataParallel(called) if wrapped else called
            called(part.shift_labels, size if wrapped else 1, **part.inputs).backward()
        own = gradients(model)
        for gradient in own.values() if not wrapped else ():
            dist.all_reduce(gradient)
        found.append(own)
    return max(relative(found[1][name], x) for name, x in found[0].items())


def test_ddp_wraps_it(world: Callable[[int], World]) -> None:
    assert max(world(4).run(averaged)) < 1e-12


def test_no_logits_are_kept_for_backward() -> None:
    ring, case = HuggingFaceRing(groups()), Case("Llama")
    model = built(case)
    use_ring_attention(model)
    part = ring.batch({key: x[:1] for key, x in batch(case, 0).items()})
    loss = ChunkedLoss(model, 3)
    largest: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        largest.append(tensor.numel() if tensor.shape[-1] == VOCAB else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), exact():
        loss(part.shift_labels, **part.inputs)
    assert max(largest) == 0


def test_refuses_what_it_does_not_know() -> None:
    with exact():
        model: Any = built(Case("Llama"))
    ChunkedLoss(model)
    assert "replaced already" in raised(ChunkedLoss, model)
    assert "ring.batch" in raised(ChunkedLoss(built(Case("Llama"))), torch.zeros(1, 2).long())
    model = built(Case("Llama"))
    model.lm_head = nn.Linear(32, VOCAB)
    assert "without bias" in raised(ChunkedLoss, model)
    model.config.model_type = "granite"
    assert "known to be right for" in raised(ChunkedLoss, model)
