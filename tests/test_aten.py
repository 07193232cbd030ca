"""The calls that the kernels on torch's operators make, on operators in plain torch."""

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from oracle import attention
from problems import Problem, dense, farthest, problems, results
from torch import Tensor

from ring_sp.kernels import KERNELS, Call, Kernel, aten
from ring_sp.kernels.contract import Rows, State, Step

PLAIN = Call("cuda", torch.bfloat16, 64, 64)


def visible(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """Causal only for squares: operators differ elsewhere."""
    assert not causal or q.shape[1] == k.shape[1] > 1
    seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
    return seen.tril() if causal else seen


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> State:
    return attention(q, k, v, visible(q, k, causal), scale)


def differentiate(
    dout: Tensor, qkv: tuple[Tensor, Tensor, Tensor], seen: State, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    groups = qkv[0].shape[2] // qkv[1].shape[2]
    q, k, v, out, grads = (x.transpose(1, 2) for x in (*qkv, seen[0], dout))
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    weights = (q @ k.mT * scale - seen[1].unsqueeze(-1)).exp() * visible(*qkv[:2], causal)
    dscores = weights * (grads @ v.mT - (grads * out).sum(-1, keepdim=True)) * scale
    sums = (dscores.mT @ q, weights.mT @ grads)
    dk, dv = (x.unflatten(1, (-1, groups)).sum(2).transpose(1, 2) for x in sums)
    return (dscores @ k).transpose(1, 2), dk, dv


def backward(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    rows: Rows,
    step: Step,
    dq: Tensor | None,
    dkv: tuple[Tensor, Tensor],
) -> Tensor:
    return aten.backward(differentiate, (q, *kv), rows, step, dq, dkv)


KERNEL = cast(
    Kernel,
    SimpleNamespace(
        forward=lambda q, k, v, step, state: aten.forward(attend, (q, k, v), step, state),
        backward=backward,
    ),
)


@pytest.mark.parametrize("how", ["one step", "gradients of keys in q's dtype", "keys cut anywhere"])
def test_the_calls_add_up_to_unsharded_attention_and_never_read_hidden_slots(how: str) -> None:
    checked: list[Problem] = [
        replace(problem, softcap=None)
        for problem in problems(torch.float64, "cpu", lse_gradient=False)
        if not problem.call().windowed
    ]
    assert len(checked) > 10
    exact = [dense(problem, torch.float64) for problem in checked]
    assert max(farthest([results(KERNEL, problem, how) for problem in checked], exact)) < 1e-12


@pytest.mark.parametrize("name", ["cudnn", "flash"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device_type": "cpu"}, "on CUDA, not on cpu"),
        ({"dtype": torch.float32}, "not in torch.float32"),
        ({"head_dim": 60, "v_head_dim": 60}, "multiples of 8"),
        ({"scale": -1.0}, "positive scale"),
        ({"softcap": True}, "no softcap"),
        ({"windowed": True}, "no sliding window"),
        ({"num_regions": 1000}, "each of 1000 documents"),
        ({"lse_gradient": True}, "no gradient of lse"),
    ],
)
def test_a_refusal_says_why(name: str, change: dict[str, object], reason: str) -> None:
    call = Call(**{**vars(PLAIN), **change})
    assert reason in (KERNELS[name].refusal(call) or "")


def test_deterministic_mode_is_for_flash_and_not_for_cudnn() -> None:
    call, reason = replace(PLAIN, deterministic=True), "torch's deterministic mode is on"
    assert reason in (KERNELS["cudnn"].refusal(call) or "")
    assert reason not in (KERNELS["cudnn"].refusal(PLAIN) or "")
    assert reason not in (KERNELS["flash"].refusal(call) or "")
