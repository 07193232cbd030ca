"""Norm and activation: values and gradients by pieces that divide nothing, and what is kept."""

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from ringed import relative
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from ring_sp import tokenwise
from ring_sp.tokenwise import RMSNorm, pieces, swiglu

EPS = 1e-5


NORM = RMSNorm(14, eps=EPS)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    out: Tensor = functional_call(NORM, {"weight": weight}, (x,))
    return out


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def activation(x: Tensor, weight: Tensor) -> Tensor:
    return swiglu(x * weight)


def activated(x: Tensor, weight: Tensor) -> Tensor:
    gate, up = (x * weight).chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


FORMULAS = [(norm, normed), (activation, activated)]
Formula = Callable[[Tensor, Tensor], Tensor]


def drawn(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """x [2, 11, 14], a weight, and what a cotangent is cut from."""
    make = torch.Generator().manual_seed(0)
    x, dout = torch.randn(2, 2, 11, 14, generator=make, dtype=torch.float64).to(dtype)
    weight = torch.randn(14, generator=make, dtype=torch.float64).to(dtype)
    return x.requires_grad_(), weight.requires_grad_(), dout


def results(f: Formula, x: Tensor, weight: Tensor, dout: Tensor) -> list[Tensor]:
    out = f(x, weight)
    return [out.detach(), *torch.autograd.grad(out, [x, weight], dout[..., : out.shape[-1]])]


@pytest.mark.parametrize("tokens", [1, 3, 11, 100])
@pytest.mark.parametrize(("mine", "plain"), FORMULAS)
def test_is_the_formula_and_so_are_all_gradients(
    mine: Formula, plain: Formula, tokens: int
) -> None:
    with mock.patch.object(tokenwise, "PIECE", tokens * 2 * 14):
        found = results(mine, *drawn())
    assert max(map(relative, found, results(plain, *drawn()))) < 1e-14


@pytest.mark.parametrize(("mine", "plain"), FORMULAS)
def test_in_bf16_is_as_near_as_torchs_own(mine: Formula, plain: Formula) -> None:
    x, weight, dout = drawn(torch.bfloat16)
    with mock.patch.object(tokenwise, "PIECE", 3 * 2 * 14):
        found = results(mine, x, weight, dout)
    with torch.no_grad():
        x, weight = (each.double().requires_grad_() for each in (x, weight))
    true = results(plain, x, weight, dout.double())
    assert [each.dtype for each in found] == [torch.bfloat16] * 3
    errors = map(relative, (each.double() for each in found), true)
    assert max(errors) < 1e-2


def test_the_norm_has_torchs_bits_and_sums_its_weights_gradient_over_pieces_in_float32() -> None:
    make = torch.Generator().manual_seed(0)
    x, dout = torch.randn(2, 1, 4096, 14, generator=make).bfloat16()
    x.requires_grad_()
    plain = nn.RMSNorm(14, EPS, dtype=torch.bfloat16)
    weight = torch.ones(14, dtype=torch.bfloat16)
    weight.requires_grad_()
    out, wanted = norm(x, weight), plain(x)
    with mock.patch.object(tokenwise, "PIECE", 16 * 14):
        dx, dweight = torch.autograd.grad(norm(x, weight), [x, weight], dout)
    true = torch.autograd.grad(wanted, [x, plain.weight], dout)
    assert torch.equal(out, wanted) and torch.equal(dx, true[0])
    # 256 sums in bf16 would be 5e-2 off.
    assert relative(dweight.double(), true[1].double()) < 4e-3


def test_they_keep_what_they_are_given_alone() -> None:
    x, weight, _ = drawn()
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        swiglu(x)
        norm(x, weight)
    assert kept == [x.data_ptr(), x.data_ptr(), weight.data_ptr()]


@pytest.mark.parametrize(("mine", "plain"), FORMULAS)
def test_the_compiler_gets_the_same(mine: Formula, plain: Formula) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(mine, backend="aot_eager", fullgraph=True)
    assert max(map(relative, results(compiled, *drawn()), results(plain, *drawn()))) < 1e-14


def test_a_frozen_weight_and_an_input_without_gradient() -> None:
    x, weight, dout = drawn()
    (dx,) = torch.autograd.grad(norm(x, weight.detach()), x, dout)
    (dweight,) = torch.autograd.grad(norm(x.detach(), weight), weight, dout)
    assert max(map(relative, [dx, dweight], results(normed, x, weight, dout)[1:])) < 1e-14
    assert not norm(x.detach(), weight.detach()).requires_grad


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_norm_takes_weights_of_another_dtype(dtype: torch.dtype, autocast: bool) -> None:
    x, _, dout = drawn(dtype)
    mine, plain = RMSNorm(14, eps=EPS), nn.RMSNorm(14, eps=EPS)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outs = mine(x), plain(x)
    assert outs[0].dtype == outs[1].dtype and torch.equal(*outs)
    grads = [
        torch.autograd.grad(out, [x, module.weight], dout.to(out.dtype))
        for out, module in zip(outs, (mine, plain), strict=True)
    ]
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("shape", [(2, 7, 3), (1, 0, 3), (3, 1, 2, 5)])
def test_pieces_are_all_tokens_in_order(shape: tuple[int, ...]) -> None:
    x = torch.arange(torch.Size(shape).numel()).view(shape)
    with mock.patch.object(tokenwise, "PIECE", 13):
        parts = pieces(x)
    assert torch.equal(torch.cat(parts, 1), x)
    assert all(part.numel() <= 13 or part.shape[1] == 1 for part in parts)


def test_the_activation_has_torchs_bits() -> None:
    x, _, dout = drawn(torch.bfloat16)
    gate, up = x.chunk(2, -1)
    out, wanted = swiglu(x), functional.silu(gate) * up
    assert torch.equal(out, wanted)
    (found,), (true,) = (torch.autograd.grad(each, x, dout[..., :7]) for each in (out, wanted))
    assert torch.equal(found, true)
