from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from conftest import World
from ranks import groups
from torch import Tensor

from ring_sp import ShardedSequence
from ring_sp.loss import IGNORE, cross_entropy_mean, shift_labels, token_mean

VOCAB = 11


def test_the_label_of_a_token_is_the_next_one() -> None:
    tokens = torch.arange(14).view(2, 7)
    assert shift_labels(tokens).tolist() == [
        [1, 2, 3, 4, 5, 6, IGNORE],
        [8, 9, 10, 11, 12, 13, IGNORE],
    ]


def test_no_document_predicts_the_first_token_of_the_next() -> None:
    tokens = torch.arange(8)[None]
    labels = shift_labels(tokens, [0, 0, 3, 4, 7])
    assert labels.tolist() == [[1, 2, IGNORE, IGNORE, 5, 6, IGNORE, IGNORE]]
    padded = shift_labels(torch.arange(6)[None], [0, 3])
    assert padded.tolist() == [[1, 2, IGNORE, IGNORE, IGNORE, IGNORE]]
    with pytest.raises(ValueError, match=r"got torch\.uint8"):
        shift_labels(torch.zeros(1, 4, dtype=torch.uint8))


def losses(weight: Tensor, hidden: Tensor, labels: Tensor) -> Tensor:
    flat = torch.nn.functional.cross_entropy(
        (hidden @ weight).flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return flat.view_as(labels)


def ring_against_one_process(averaged: bool) -> tuple[float, float]:
    """Differences of loss and weight gradient from one process; data 2 x ring 2, most labels of one
    rank ignored."""
    manager = groups(ring=2)
    make = torch.Generator().manual_seed(1)
    weight = torch.randn(6, VOCAB, generator=make, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(4, 13, 6, generator=make, dtype=torch.float64)
    labels = shift_labels(torch.randint(VOCAB, (4, 13), generator=make))
    labels[0, :9], labels[3, 2:] = IGNORE, IGNORE
    whole = token_mean(losses(weight, hidden, labels), labels != IGNORE)
    (wanted,) = torch.autograd.grad(whole, weight)

    seq = ShardedSequence(13, manager.topology)
    rows = slice(2 * manager.rank("data"), 2 * manager.rank("data") + 2)
    own_hidden, own_labels = seq.shard(hidden[rows]), seq.shard(labels[rows])
    group, size = manager.group("data_sequence"), manager.size("data_sequence")
    loss = token_mean(
        losses(weight, own_hidden, own_labels), own_labels != IGNORE, group, size if averaged else 1
    )
    (grad,) = torch.autograd.grad(loss, weight)
    dist.all_reduce(grad, group=group)
    grad = grad / size if averaged else grad
    return (loss - whole).abs().item(), (grad - wanted).abs().max().item()


@pytest.mark.parametrize("averaged", [False, True], ids=["host sums", "host averages"])
def test_gradients_after_the_host_equal_one_process(
    world: Callable[[int], World], averaged: bool
) -> None:
    for difference in world(4).run(ring_against_one_process, averaged):
        assert max(difference) < 1e-14


def test_nothing_to_count_is_zero_and_not_nan() -> None:
    losses = torch.tensor([float("inf"), 1.0], requires_grad=True)
    loss = token_mean(losses, torch.zeros(2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0.0
    assert losses.grad is not None and losses.grad.tolist() == [0.0, 0.0]


def test_bad_input_is_refused() -> None:
    ones, seen = torch.ones(2, 4), torch.ones(2, 4, dtype=torch.bool)
    for losses, counted in ((ones, seen[0]), (ones, seen.long())):
        with pytest.raises(ValueError, match="must have one shape, counted bool"):
            token_mean(losses, counted)
    tokens, untyped = torch.ones(2, 4, dtype=torch.int64), cast(Any, shift_labels)
    for message, given in (
        ("tokens must be", (tokens[0], None)),
        ("whole number", (tokens, [0, 1.5])),
        ("cu_seqlens", (tokens, [])),
    ):
        with pytest.raises(ValueError, match=message):
            untyped(*given)


def test_half_precision_losses_are_summed_in_float32() -> None:
    losses = torch.full((70_000,), 2.0, dtype=torch.float16)
    assert token_mean(losses, torch.ones(70_000, dtype=torch.bool)).item() == 2.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_cross_entropy_of_logits_is_wide_averaged_and_counted(dtype: torch.dtype) -> None:
    make = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 5, VOCAB, generator=make, dtype=torch.float64).to(dtype)
    labels = torch.randint(VOCAB, (2, 5), generator=make)
    labels[0, :2] = IGNORE
    exact = logits.double()[labels != IGNORE].log_softmax(-1)
    exact = -exact.gather(1, labels[labels != IGNORE][:, None]).sum() / 50
    logits.requires_grad_()
    found = cross_entropy_mean(logits, labels, averaged_over=3, count=torch.tensor(50))
    assert abs(found.double() - exact) < 1e-6 and found.dtype in (torch.float32, torch.float64)
    (grad,) = torch.autograd.grad(found, logits)
    wanted = logits.detach().double().softmax(-1)
    wanted.view(-1, VOCAB)[torch.arange(10), labels.flatten().clamp_min(0)] -= 1
    wanted = wanted.masked_fill(labels[..., None] == IGNORE, 0) * 3 / 50
    assert (grad.double() - wanted).norm() / wanted.norm() < torch.finfo(dtype).eps
    with pytest.raises(ValueError, match="the same tokens"):
        cross_entropy_mean(logits, labels[:, 1:])


def test_missing_labels_are_named() -> None:
    with pytest.raises(ValueError, match="needs labels"):
        cross_entropy_mean(torch.zeros(1, 2, VOCAB), None)
