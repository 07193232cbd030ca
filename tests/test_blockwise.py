import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from ringed import relative
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import ring_sp
from ring_sp.blockwise import blockwise


class FeedForward(nn.Module):
    """Norm, feed-forward, dropout and residual; remembers the most tokens that it saw at once."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(6), nn.Linear(6, 20), nn.Linear(20, 6)
        self.dropout, self.most = nn.Dropout(dropout), 0

    def forward(self, x: Tensor) -> Tensor:
        self.most = max(self.most, x.shape[1])
        return x + self.dropout(self.down(self.up(self.norm(x)).relu()))


def made(dropout: float = 0.0) -> tuple[FeedForward, Tensor, Tensor]:
    torch.manual_seed(0)
    drawn = torch.randn(2, 2, 13, 6, dtype=torch.float64)
    return FeedForward(dropout).double(), drawn[0].requires_grad_(), drawn[1]


@pytest.mark.parametrize("chunk", [1, 4, 13, 50])
def test_is_the_whole_and_so_are_all_gradients(chunk: int) -> None:
    module, x, dout = made()
    trained = [x, *module.parameters()]
    wanted = torch.autograd.grad(module(x), trained, dout)
    module.most = 0
    out = blockwise(module, x, chunk)
    assert relative(out.detach(), module(x).detach()) < 1e-15
    module.most = 0
    for mine, true in zip(torch.autograd.grad(out, trained, dout), wanted, strict=True):
        assert relative(mine, true) < 1e-14
    assert module.most == min(chunk, 13)


def test_along_another_dim_and_without_gradients() -> None:
    module, x, _ = made()
    turned = blockwise(lambda part: module(part.transpose(0, 1)).transpose(0, 1), x.mT.mT, 1, dim=0)
    assert relative(turned.detach(), module(x).detach()) < 1e-15
    with torch.no_grad():
        assert relative(blockwise(module, x, 5), turned) < 1e-15


def test_a_part_is_dense() -> None:
    module, x, dout = made()
    out = blockwise(lambda part: module(part.view(1, -1, 6)).view_as(part), x, 4)
    assert relative(out.detach(), module(x).detach()) < 1e-15
    (mine,), (true,) = (torch.autograd.grad(each, x, dout) for each in (out, module(x)))
    assert relative(mine, true) < 1e-14


def test_keeps_what_one_chunk_keeps() -> None:
    module, x, _ = made()
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
        whole = sum(kept)
        kept.clear()
        blockwise(module, x, 2)
    assert sum(kept) <= x.numel() < whole


def test_dropout_draws_the_same_again() -> None:
    module, x, dout = made(0.5)
    torch.manual_seed(3)
    out = blockwise(module, x, 4)
    (mine,) = torch.autograd.grad(out, x, dout)
    torch.manual_seed(3)
    parts = [part.detach().requires_grad_() for part in x.split(4, 1)]
    outs = [module(part) for part in parts]
    assert torch.equal(out, torch.cat(outs, 1))
    true = torch.autograd.grad(outs, parts, dout.split(4, 1))
    assert relative(mine, torch.cat(true, 1)) < 1e-14


def test_a_weight_is_told_once() -> None:
    module, x, dout = made()
    calls: list[Tensor] = []
    module.up.weight.register_post_accumulate_grad_hook(calls.append)
    blockwise(module, x, 2).backward(dout)
    assert len(calls) == 1


def linear(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return x + functional.linear(functional.linear(x, up).sin(), down)


def given_weights(dtype: torch.dtype, tokens: int) -> tuple[list[Tensor], Tensor]:
    """x, two weights, and a cotangent."""
    make = torch.Generator().manual_seed(0)
    shapes = [(2, tokens, 6), (20, 6), (6, 20), (2, tokens, 6)]
    drawn = [torch.randn(s, generator=make, dtype=torch.float64).to(dtype) for s in shapes]
    return [x.requires_grad_() for x in drawn[:3]], drawn[3]


def by_weights(x: Tensor, *weights: Tensor) -> Tensor:
    return blockwise(linear, x, 4, weights=weights)


def by_knowing(x: Tensor, *weights: Tensor) -> Tensor:
    return blockwise(lambda part: linear(part, *weights), x, 4)


def by_both(x: Tensor, *weights: Tensor) -> Tensor:
    return blockwise(
        lambda part, up: linear(part, (up + weights[0]) / 2, weights[1]), x, 4, weights=weights[:1]
    )


Around = Callable[..., Tensor]
AROUND: dict[str, Around] = {
    "nothing": lambda f, *inputs: f(*inputs),
    "ours": ring_sp.checkpoint,
    "saved tensors": partial(checkpoint, use_reentrant=False),
    "reentrant": partial(checkpoint, use_reentrant=True),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("f", [by_weights, by_knowing, by_both])
def test_gradients_of_weights_inside_any_checkpoint(f: Around, around: str) -> None:
    inputs, dout = given_weights(torch.float64, 13)
    wanted = torch.autograd.grad(linear(*inputs), inputs, dout)
    AROUND[around](f, *inputs).backward(dout)
    found = [x.grad for x in inputs if x.grad is not None]
    assert max(map(relative, found, wanted)) < 1e-14


@pytest.mark.parametrize(("around", "runs"), [*zip(AROUND, (2, 2, 2, 3), strict=True)])
def test_a_checkpoint_that_ends_with_it_runs_fn_no_more_often(around: str, runs: int) -> None:
    module, x, dout = made()
    seen: list[int] = []
    module.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    out = AROUND[around](lambda x: blockwise(module, x.sin(), 4), x)
    out.backward(dout)
    assert sorted(seen) == [1] * runs + [4] * 3 * runs


@pytest.mark.parametrize("around", list(AROUND)[:3])
def test_a_graph_that_is_kept_can_be_gone_through_again(around: str) -> None:
    inputs, dout = given_weights(torch.float64, 13)
    out = AROUND[around](by_weights, *inputs)
    first, second = (torch.autograd.grad(out, inputs, dout, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    # Of a part of the tokens alone, and of x alone.
    (found,) = torch.autograd.grad(out[:, 5:6], inputs[0], dout[:, 5:6])
    assert torch.equal(found[:, 5:6], first[0][:, 5:6]) and found[:, :5].count_nonzero() == 0


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_what_is_frozen_gets_nothing_and_the_rest_its_own(trained: int) -> None:
    inputs, dout = given_weights(torch.float64, 13)
    wanted = torch.autograd.grad(linear(*inputs), inputs[trained], dout)
    alone = [x if n == trained else x.detach() for n, x in enumerate(inputs)]
    found = torch.autograd.grad(by_weights(*alone), alone[trained], dout)
    assert relative(found[0], wanted[0]) < 1e-14
    assert not by_weights(*(x.detach() for x in inputs)).requires_grad


def test_one_weight_in_two_places_gets_the_sum() -> None:
    (x, up, _), dout = given_weights(torch.float64, 13)
    wanted = torch.autograd.grad(linear(x, up, up.mT), up, dout)

    def twice(part: Tensor, one: Tensor, other: Tensor) -> Tensor:
        return linear(part, one, other.mT)

    found = torch.autograd.grad(blockwise(twice, x, 4, weights=(up, up)), up, dout)
    assert relative(found[0], wanted[0]) < 1e-14


def compiled(f: Around) -> Around:
    torch._dynamo.reset()
    done: Around = torch.compile(f, backend="aot_eager", fullgraph=True)
    return done


@pytest.mark.parametrize("f", [by_weights, by_knowing])
def test_the_compiler_takes_it_whole(f: Around) -> None:
    inputs, dout = given_weights(torch.float64, 13)
    wanted = torch.autograd.grad(linear(*inputs), inputs, dout)
    found = torch.autograd.grad(compiled(f)(*inputs), inputs, dout)
    assert max(map(relative, found, wanted)) < 1e-14


@pytest.mark.parametrize("run", [lambda f: f, compiled], ids=["as it is", "compiled"])
def test_weights_gradients_are_summed_in_float32(run: Callable[[Around], Around]) -> None:
    inputs, dout = given_weights(torch.bfloat16, 300)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    wanted = torch.autograd.grad(linear(*wide), wide[1:], dout.double())
    found, other = (
        torch.autograd.grad(run(f)(*inputs), inputs[1:], dout) for f in (by_weights, by_knowing)
    )
    assert {x.dtype for x in found} == {torch.bfloat16}
    for mine, coarse, true in zip(found, other, wanted, strict=True):
        assert 2 * relative(mine.double(), true) < relative(coarse.double(), true)


def test_what_the_host_hung_on_saved_tensors_gets_x_once() -> None:
    inputs, dout = given_weights(torch.float64, 13)
    wanted = torch.autograd.grad(linear(*inputs), inputs, dout)
    sizes: list[int] = []

    def away(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(away, Tensor.clone):
        out = by_weights(*inputs)
    assert sizes == [inputs[0].numel()]
    found = torch.autograd.grad(out, inputs, dout)
    assert max(map(relative, found, wanted)) < 1e-14


def test_backward_lets_go_of_x() -> None:
    inputs, dout = given_weights(torch.float64, 13)
    x = inputs[0] * 1
    stored = StorageWeakRef(x.untyped_storage())
    out = by_weights(x, *inputs[1:])
    del x
    assert not stored.expired()
    out.backward(dout)
    assert stored.expired()
    with pytest.raises(RuntimeError, match="second time"):
        out.backward(dout)


def test_a_checkpoint_around_it_has_x_in_backward_alone() -> None:
    module, x, dout = made()
    stored: list[StorageWeakRef] = []

    def layer(x: Tensor) -> Tensor:
        x = x.sin()
        stored.append(StorageWeakRef(x.untyped_storage()))
        return blockwise(module, x, 4)

    out = ring_sp.checkpoint(layer, x)
    for backwards in range(3):
        assert len(stored) == 1 + backwards and all(each.expired() for each in stored)
        torch.autograd.grad(out, x, dout, retain_graph=True)


def test_x_must_not_change() -> None:
    inputs, dout = given_weights(torch.float64, 13)
    x = inputs[0] * 1
    out = by_weights(x, *inputs[1:])
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(dout)


@pytest.mark.parametrize(
    ("fn", "chunk", "need"),
    [
        (lambda x: x, 0, "at least 1; got 0"),
        (lambda x: x[:, 1:], 4, "4 along dim 1; got (2, 3, 6)"),
        (lambda x: (x, x), 4, "got <class 'tuple'>"),
        (lambda x: x.sum(), 4, "got ()"),
    ],
)
def test_refuses_what_is_not_by_token(fn, chunk: int, need: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=re.escape(need)):
        blockwise(fn, made()[1], chunk)
