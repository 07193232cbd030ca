import re

import pytest
import torch
from ringed import relative
from torch import Tensor, nn

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


@pytest.mark.parametrize(
    ("fn", "chunk", "need"),
    [
        (lambda x: x, 0, "at least 1; got 0"),
        (lambda x: x[:, 1:], 4, "4 along dim 1; got (2, 3, 6)"),
        (lambda x: (x, x), 4, "got <class 'tuple'>"),
    ],
)
def test_refuses_what_is_not_by_token(fn, chunk: int, need: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=re.escape(need)):
        blockwise(fn, made()[1], chunk)
