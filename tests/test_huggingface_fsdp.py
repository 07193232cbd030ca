"""FSDP2 over data and ring ranks has the gradients, norm and steps of one process."""

from collections.abc import Callable

import pytest
import torch
from conftest import World
from ranks import groups
from ringed import relative
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

pytest.importorskip("transformers")
from hf_models import Batch, Case, batch, built, exact, gradients, labelled, stock

from ring_sp.integrations.huggingface import HuggingFaceRing, RingLoader, use_ring_attention

RATE = 0.1
CUTS = (0, 9, 10, 27)


def stepped(weights: Batch, found: Batch, norm: Tensor) -> Batch:
    """Weights after a step down the gradients, clipped to half of their norm."""
    return {
        name: weights[name] - RATE * found[name] * (0.5 * norm / (norm + 1e-6)) for name in weights
    }


def whole(x: Tensor) -> Tensor:
    assert isinstance(x, DTensor)
    return x.full_tensor()


def errors(case: Case) -> list[tuple[float, str]]:
    """Two batches, accumulated, clipped and stepped under FSDP2: how far loss, gradients, norm and
    weights are from those of both in one process; worst first.
    """
    ring = HuggingFaceRing(groups(ring=case.ring, ulysses=case.ulysses), case.layout)
    data_rank, data_size = ring.manager.rank("data"), ring.manager.size("data")
    own = [batch(case, number) for number in range(data_rank, 2, data_size)]
    count = torch.tensor(labelled(case, 2))
    with exact():
        _, wanted_loss, wanted = stock(case, 2)
        before = {name: x.detach() for name, x in built(case).named_parameters()}
        norm = torch.stack([x.norm() for x in wanted.values()]).norm()
        model = built(case)
        use_ring_attention(model)
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        total = torch.zeros((), dtype=torch.float64)
        for part in RingLoader(own, ring):
            assert part.shift_labels is not None
            logits = model(**part.inputs).logits
            loss = ring.loss(logits, part.shift_labels, 4, count)
            loss.backward()
            total += loss.detach()
        found = {name: whole(x) for name, x in gradients(model).items()}
        got = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5 * float(norm)))
        torch.optim.SGD(model.parameters(), RATE).step()
    after = stepped(before, wanted, norm)
    far = [(relative(total, wanted_loss), "loss"), (relative(got, norm), "norm")]
    far += [(relative(found[name], x), f"gradient of {name}") for name, x in wanted.items()]
    far += [(relative(whole(x), after[name]), name) for name, x in model.named_parameters()]
    return sorted(far, reverse=True)


@pytest.mark.parametrize(
    "case",
    [
        Case("Llama", 4, checkpointing=True),
        Case("Qwen3", 2),
        Case("Gemma2", 4, rows=1, cuts=CUTS, layout="striped"),
        Case("GptOss", 2, ulysses=2),
    ],
    ids=str,
)
def test_fsdp2_over_a_ring_equals_one_process(world: Callable[[int], World], case: Case) -> None:
    for worst, *_ in world(4).run(errors, case):
        assert worst[0] < 1e-11, worst
