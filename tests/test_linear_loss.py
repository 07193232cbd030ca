"""The chunked loss against torch's, values and gradients."""

import re
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import World
from live import LiveBytes
from ranks import groups
from ringed import relative
from torch import Tensor
from torch.nn.functional import cross_entropy

from ring_sp import linear_loss
from ring_sp.linear_loss import LinearLoss, linear_cross_entropy
from ring_sp.loss import IGNORE, cross_entropy_mean

WORDS, DIM = 12, 6


def drawn(dtype: torch.dtype = torch.float64, tokens: int = 17) -> tuple[Tensor, Tensor, Tensor]:
    """x [2, tokens, DIM], weight and labels, of which some are ignored."""
    make = torch.Generator().manual_seed(tokens)
    x = torch.randn(2, tokens, DIM, generator=make, dtype=torch.float64).to(dtype)
    weight = (2 * torch.randn(WORDS, DIM, generator=make, dtype=torch.float64)).to(dtype)
    labels = torch.randint(WORDS, (2, tokens), generator=make)
    labels[0, :5], labels[1, -1] = IGNORE, IGNORE
    return x.requires_grad_(), weight.requires_grad_(), labels


def whole(x: Tensor, weight: Tensor, labels: Tensor, options: LinearLoss) -> Tensor:
    """The same with all logits at once."""
    logits = (x @ weight.mT).flatten(0, 1)
    if options.softcap:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    losses = cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="none")
    losses = losses + options.z_loss * logits.logsumexp(-1).square()
    return losses[labels.flatten() != IGNORE].mean()


OPTIONS = [
    LinearLoss(),
    LinearLoss(chunk=1),
    LinearLoss(chunk=7, softcap=3.0, z_loss=0.1),
    LinearLoss(chunk=1000, z_loss=0.3),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_is_the_loss_of_whole_logits(options: LinearLoss) -> None:
    x, weight, labels = drawn()
    found, wanted = linear_cross_entropy(x, weight, labels, options=options), 0.7
    true = whole(x, weight, labels, options)
    assert relative(found, true) < 1e-14
    mine = torch.autograd.grad(found * wanted, (x, weight))
    for own, exact in zip(mine, torch.autograd.grad(true * wanted, (x, weight)), strict=True):
        assert relative(own, exact) < 1e-13


@pytest.mark.parametrize(("options", "most"), [(LinearLoss(chunk=3), 3), (LinearLoss(), 4)])
def test_no_more_logits_are_there_at_a_time(options: LinearLoss, most: int) -> None:
    chunk = mock.Mock(wraps=linear_loss._chunk)
    with (
        mock.patch.object(linear_loss, "_chunk", chunk),
        mock.patch.object(linear_loss, "LOGITS", 5 * WORDS - 1),
    ):
        linear_cross_entropy(*drawn(), options=options)
    assert max(len(call.args[0]) for call in chunk.call_args_list) == most


@pytest.mark.parametrize("words", [1, 5, 12, 13])
def test_weights_gradient_is_added_by_words_of_any_number(words: int) -> None:
    x, weight, labels = drawn()
    true = torch.autograd.grad(whole(x, weight, labels, LinearLoss()), weight)
    with mock.patch.object(linear_loss, "LOGITS", 16 * words * DIM):
        (found,) = torch.autograd.grad(linear_cross_entropy(x, weight, labels), weight)
    assert relative(found, true[0]) < 1e-13


def test_beside_gradients_there_are_the_logits_of_a_chunk() -> None:
    words, dim, chunk, tokens = 1024, 64, 64, 512
    x = torch.randn(tokens, dim, requires_grad=True)
    weight = torch.randn(words, dim, requires_grad=True)
    unit = 4 * words * dim  # of a gradient of the weight, and of the logits of a chunk
    labels = torch.randint(words, (tokens,))
    with LiveBytes() as live, mock.patch.object(linear_loss, "LOGITS", 16 * 64 * dim):
        linear_cross_entropy(x, weight, labels, options=LinearLoss(chunk=chunk)).backward()
    assert 2 + tokens / words <= live.peak / unit < 2.5 + tokens / words


def test_is_averaged_and_counted_as_whole_logits_are() -> None:
    x, weight, labels = drawn()
    shared: dict[str, Any] = {"averaged_over": 3, "count": torch.tensor(50)}
    found = linear_cross_entropy(x, weight, labels, **shared)
    true = cross_entropy_mean(x @ weight.mT, labels, **shared)
    assert relative(found, true) < 1e-14
    (own,), (exact,) = (torch.autograd.grad(loss, weight) for loss in (found, true))
    assert relative(own, exact) < 1e-13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_rounded_no_more_than_once_a_chunk(dtype: torch.dtype) -> None:
    x, weight, labels = drawn(dtype, 400)
    found = linear_cross_entropy(x, weight, labels, options=LinearLoss(chunk=16))
    exact = [each.detach().double().requires_grad_() for each in (x, weight)]
    true = whole(exact[0], exact[1], labels, LinearLoss())
    assert found.dtype == torch.float32 and relative(found, true) < 1e-6
    scale = 2.0**16  # as a gradient scaler's: without it float16 has no number as small
    mine = torch.autograd.grad(found * scale, (x, weight))
    for own, true_gradient in zip(mine, torch.autograd.grad(true * scale, exact), strict=True):
        assert own.dtype == dtype and relative(own, true_gradient) < torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_autocast_rounds_what_comes_in_and_nothing_else(dtype: torch.dtype) -> None:
    x, weight, labels = drawn(torch.float64 if dtype == torch.float64 else torch.float32)
    given = x.to(dtype)
    low = [y if dtype == torch.float64 else y.bfloat16() for y in (given, weight)]
    wanted = linear_cross_entropy(low[0], low[1], labels)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(given, weight, labels)
    assert torch.equal(found, wanted) and found.dtype == wanted.dtype
    true = torch.autograd.grad(wanted, (x, weight))
    assert all(map(torch.equal, torch.autograd.grad(found, (x, weight)), true))


def test_only_the_gradients_asked_for_are_made() -> None:
    x, weight, labels = drawn()
    both = torch.autograd.grad(linear_cross_entropy(x, weight, labels), (x, weight))
    (alone,) = torch.autograd.grad(linear_cross_entropy(x, weight.detach(), labels), x)
    assert torch.equal(alone, both[0])
    (alone,) = torch.autograd.grad(linear_cross_entropy(x.detach(), weight, labels), weight)
    assert torch.equal(alone, both[1])
    wanted = linear_cross_entropy(x, weight, labels)
    product = mock.Mock(wraps=linear_loss._product)
    with torch.no_grad(), mock.patch.object(linear_loss, "_product", product):
        assert torch.equal(linear_cross_entropy(x, weight, labels), wanted)
    assert product.call_count == 1, "that of the logits"


def over_ranks(tensor: int) -> float:
    """Largest difference from one process of loss and gradients, the vocabulary split over tensor
    ranks, tokens over the others."""
    manager = groups(tensor=tensor, ring=2)
    options = LinearLoss(chunk=5, softcap=4.0, z_loss=0.2)
    x, weight, labels = drawn()
    true = whole(x, weight, labels, options)
    exact = torch.autograd.grad(true, (x, weight))
    rows = slice(manager.rank("tensor") * WORDS // tensor, None)
    own = weight.detach()[rows][: WORDS // tensor].clone().requires_grad_()
    cut = [slice(0, 4), slice(4, None)][manager.rank("ring")]
    part = x.detach()[:, cut].clone().requires_grad_()
    split = LinearLoss(4.0, 0.2, manager.group("tensor") if tensor > 1 else None, 5)
    ring = manager.group("ring")
    found = linear_cross_entropy(part, own, labels[:, cut], group=ring, options=split)
    found.backward()
    assert own.grad is not None and part.grad is not None
    torch.distributed.all_reduce(own.grad, group=ring)
    wanted = exact[1][rows][: WORDS // tensor]
    pairs = [(found, true), (part.grad, exact[0][:, cut]), (own.grad, wanted)]
    return max(relative(mine.detach(), other.detach()) for mine, other in pairs)


@pytest.mark.parametrize("tensor", [1, 2])
def test_ranks_share_vocabulary_and_tokens(world, tensor: int) -> None:  # type: ignore[no-untyped-def]
    ranks: World = world(2 * tensor)
    assert max(ranks.run(over_ranks, tensor)) < 1e-13


def split_in_two(first: int, logits: int) -> bool:
    """Whether there is a loss where the first of two ranks has so many words."""
    manager = groups(tensor=2)
    x, weight, labels = drawn()
    labels %= 5  # Words of the first rank: no label is missed.
    own = weight[:first] if manager.rank("tensor") == 0 else weight[first:]
    split = LinearLoss(vocab_group=manager.group("tensor"))
    with mock.patch.object(linear_loss, "LOGITS", logits):
        return bool(linear_cross_entropy(x, own, labels, options=split).isfinite())


@pytest.mark.parametrize("logits", [linear_loss.LOGITS, WORDS], ids=["whole", "chunks"])
def test_a_vocabulary_in_unequal_parts_gives_nan(world, logits: int) -> None:  # type: ignore[no-untyped-def]
    assert world(2).run(split_in_two, WORDS // 2, logits) == [True, True]
    assert world(2).run(split_in_two, WORDS // 2 + 1, logits) == [False, False]


def test_a_label_that_is_no_word_gives_nan() -> None:
    x, weight, labels = drawn()
    for wrong in (WORDS, -1):
        labels[1, 2] = wrong
        assert linear_cross_entropy(x, weight, labels).isnan()


def test_gradients_are_given_once() -> None:
    x, weight, labels = drawn()
    loss = linear_cross_entropy(x, weight, labels)
    torch.autograd.grad(loss, x, retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        torch.autograd.grad(loss, x)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(linear_cross_entropy(x, weight, labels), x, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_it_gives_the_same(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    x, weight, labels = drawn(dtype)
    options = LinearLoss(chunk=5)
    losses = [
        loss(x, weight, labels, options=options)
        for loss in (torch.compile(linear_cross_entropy, backend="eager"), linear_cross_entropy)
    ]
    found, wanted = (torch.autograd.grad(loss, (x, weight)) for loss in losses)
    assert max(map(relative, [losses[0], *found], [losses[1], *wanted])) < 1e-6


def test_takes_a_token_alone() -> None:
    x, weight, labels = drawn()
    alone = linear_cross_entropy(x[1, 3], weight, labels[1, 3])
    assert relative(alone, whole(x[1:, 3:4], weight, labels[1:, 3:4], LinearLoss())) < 1e-14


def test_nothing_counted_is_a_loss_of_zero() -> None:
    x, weight, labels = drawn()
    loss = linear_cross_entropy(x, weight, labels.fill_(IGNORE))
    assert loss == 0 and not torch.autograd.grad(loss, x)[0].any()


def test_refuses_what_does_not_fit() -> None:
    x, weight, labels = drawn()
    for bad, need in [
        ((x, weight, labels[:, 1:]), "(2, 17, 6), (12, 6) and (2, 16)"),
        ((x, weight[:, 1:], labels), "(12, 5)"),
        ((x, weight[:0], labels), "(0, 6)"),
        ((x, weight, labels.int()), "got torch.int32"),
        ((x.float(), weight, labels), "torch.float32 and torch.float64"),
    ]:
        with pytest.raises(ValueError, match=re.escape(need)):
            linear_cross_entropy(*bad)
    for options in ({"chunk": 0}, {"softcap": 0.0}, {"z_loss": -1.0}, {"z_loss": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(options))):
            LinearLoss(**options)
