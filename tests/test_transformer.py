"""The parts of the transformer that are its own; see test_modules and test_checkpointing."""

import torch
from torch.nn import functional

from ring_sp import AttentionConfig, RingTransformer
from ring_sp.tokenwise import swiglu


def test_the_activation_keeps_its_input_alone_and_has_the_gradient_of_the_whole() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 14, dtype=torch.float64, requires_grad=True)
    dout = torch.randn(2, 5, 7, dtype=torch.float64)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = swiglu(x)
    gate, up = x.chunk(2, -1)
    expected = functional.silu(gate) * up
    torch.testing.assert_close(out, expected, rtol=1e-14, atol=1e-14)
    (found,), (wanted,) = (torch.autograd.grad(each, x, dout) for each in (out, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)
    assert [each.data_ptr() for each in kept] == [x.data_ptr()]


def test_the_width_of_the_feed_forward_may_be_no_multiple_of_the_models() -> None:
    model = RingTransformer(17, 1, AttentionConfig(dim=8, num_heads=2), ff_multiple=28 / 8)
    assert model.blocks[0].down.in_features == 28
