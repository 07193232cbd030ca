"""Tensors of more elements than 32 bits count, on a GPU with 80 GB."""

import pytest
import torch
from torch import Tensor

from ring_sp import ShardedSequence, Topology, masks, ring_attention
from ring_sp.kernels import KERNELS, Call
from ring_sp.kernels.contract import State
from ring_sp.kernels.fold import fold

pytestmark = pytest.mark.gpu

TOKENS, HEADS, KV_HEADS, DIM = 2**19 + 5000, 32, 8, 128
TAIL, LEFT = 2048, 256
"""Tokens that are compared, and how far each of them sees."""


@pytest.fixture(autouse=True)
def room() -> None:
    assert TOKENS * HEADS * DIM > 2**31
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 7e10:
        pytest.skip("takes 70 GB")


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device="cuda")


def attended(kernel: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """out, and the gradients of q, k and v, from these and out's."""
    q, k, v, dout = (x.detach().requires_grad_() for x in tensors)
    mask = masks.sliding_window(LEFT)
    sequence = ShardedSequence(q.shape[1], Topology(), mask=mask, layout="contiguous")
    out = ring_attention(q, k, v, sequence, kernel=kernel)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)


@pytest.mark.parametrize("name", ["triton", "flash4"])
def test_the_last_tokens_get_what_they_get_alone(name: str) -> None:
    if reason := KERNELS[name].refusal(Call("cuda", torch.bfloat16, DIM, DIM)):
        pytest.skip(reason)
    long = [randn(1, TOKENS, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    seen = [x[:, -TAIL - LEFT :].float() for x in long]
    all_found, all_exact = attended(name, *long), attended("reference", *seen)
    for found, exact in zip(all_found, all_exact, strict=True):
        apart = found[:, -TAIL:].float() - exact[:, -TAIL:]
        assert apart.abs().max() < 0.05 * exact.abs().max() and found[:, :TAIL].any()


def test_a_fold_of_the_last_tokens_is_that_of_them_alone() -> None:
    heads, rows = HEADS, slice(TOKENS - 2 * TAIL, TOKENS)

    def state(number: int, dtype: torch.dtype) -> State:
        lse = randn(1, heads, number, dtype=torch.float32)
        return randn(1, number, heads, DIM, dtype=dtype), lse

    whole, part = state(TOKENS, torch.float32), state(2 * TAIL, torch.bfloat16)
    last = whole[0][:, rows].clone(), whole[1][:, :, rows].clone()
    wanted = fold(last, part, slice(0, 2 * TAIL), 2 * TAIL, torch.float32)
    found = fold(whole, part, rows, TOKENS, torch.float32)
    assert torch.equal(found[0][:, rows], wanted[0])
    assert torch.equal(found[1][:, :, rows], wanted[1])
