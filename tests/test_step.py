"""The experiments' training step: the same on a ring as on one rank, whatever is kept."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import World
from ranks import groups
from step import BETAS, CLIP, Clock, Form, Training

from ring_sp.job import Choice
from ring_sp.model_shape import ModelShape

CPU = torch.device("cpu")
MODEL = ModelShape("tiny", 4, 48, 6, 2, 8, 96, 80, tied=True)
FORMS: dict[str, dict[str, Any]] = {
    "all is kept": {},
    "by chunks": {"checkpoint": "selective", "ff_chunk": 7, "loss_chunk": 5},
    "every 2 layers": {"checkpoint": "full", "every": 2, "loss_chunk": 16},
    "offloaded": {"checkpoint": "selective", "offload": True},
}


def trained(
    ring: int, seq_len: int, steps: int, form: str = "all is kept", vanilla: bool = False
) -> Any:
    """Loss, this rank's gradients, and losses of `steps` of AdamW with the weights after them."""
    asked = Form(MODEL, Choice(ring=ring, **FORMS[form]), vanilla)
    training = Training(asked, groups(ring=ring).topology, CPU)
    loss = training.differentiate(seq_len, 3, Clock(training.device)).item()
    own = training.gradients.clone()
    training.forget()
    told = [training.run(seq_len, 3).loss for _ in range(steps)]
    assert not training.gradients.any()
    return loss, own, told, training.weights.clone()


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Of two vectors, beside the second; the longer of them ends with padding, and random numbers
    of torch's are others in the last 16.
    """
    size = min(found.numel(), wanted.numel()) - 16
    return ((found[:size].float() - wanted[:size]).norm() / wanted[:size].norm()).item()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ring", [2, 3])
def test_a_ring_takes_the_step_of_one_rank(
    world: Callable[[int], World], ring: int, form: str
) -> None:
    (loss, gradients, told, weights), *_ = world(1).run(trained, 1, 61, 4)
    found = world(ring).run(trained, ring, 61, 4, form)
    # A unit in the last place of bf16 is 0.8% of a weight; of sums over many it is less.
    assert distance(sum(each[1] for each in found), gradients) < 0.02
    for each in found:
        assert each[0] == pytest.approx(loss, rel=1e-3)
        assert each[2] == pytest.approx(told, rel=5e-3)
        assert torch.equal(each[3], found[0][3]) and distance(each[3], weights.float()) < 0.01
    assert told[-1] < told[0] - 0.05


def test_the_attention_of_all_pairs_is_attention(world: Callable[[int], World]) -> None:
    (loss, gradients, _, _), *_ = world(1).run(trained, 1, 61, 0)
    (other, found, _, _), *_ = world(1).run(trained, 1, 61, 0, "all is kept", True)
    assert other == pytest.approx(loss, rel=1e-3) and distance(found, gradients) < 0.02


def test_rings_side_by_side_train_on_the_mean_of_their_sequences(
    world: Callable[[int], World],
) -> None:
    ranks = world(2).run(trained, 1, 61, 4)
    assert ranks[0][0] != ranks[1][0] and torch.equal(ranks[0][3], ranks[1][3])
    assert all(each[2][-1] < each[2][0] - 0.05 for each in ranks)


def clipped(ring: int) -> float:
    """The square of this rank's share of a gradient that is far too long, as Adam got it."""
    training = Training(Form(MODEL, Choice(ring=ring)), groups(ring=ring).topology, CPU)
    training.differentiate(61, 3, Clock(CPU))
    training.gradients *= 1000
    training.update(Clock(CPU))
    moment = training.optimizer.state[training.master]["exp_avg"] / (1 - BETAS[0])
    return moment.square().sum().item()


@pytest.mark.parametrize("ring", [1, 2])
def test_gradients_are_clipped_by_the_norm_of_all_ranks(
    world: Callable[[int], World], ring: int
) -> None:
    assert sum(world(2).run(clipped, ring)) == pytest.approx(CLIP**2, rel=1e-3)
