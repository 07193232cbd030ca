"""The calls that flash4 makes, on an emulation of the library in plain torch."""

import re
from itertools import accumulate
from random import Random
from typing import Any

import pytest
import torch
from problems import Problem, dense, farthest, problems, results
from torch import Tensor

from ring_sp import layout, masks
from ring_sp.kernels import Call, flash4

BLOCK = 16
"""The library computes in blocks, with what lies behind a sequence in them."""


def sequences(x: Tensor, cu_seqlens: Tensor | None) -> list[slice]:
    if cu_seqlens is None:
        return [slice(0, x.shape[1])]
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens[-1] == x.shape[0]
    return [
        slice(*pair) for pair in zip(cu_seqlens.tolist(), cu_seqlens[1:].tolist(), strict=False)
    ]


def block(at: slice, num_rows: int) -> slice:
    length = -((at.start - at.stop) // BLOCK) * BLOCK
    return slice(at.start, min(at.start + length, num_rows))


def softmax(
    q: Tensor, k: Tensor, rows: int, cols: int, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores before the cap, scores and visibility, [B, H, blocks of q, blocks of k]."""
    left, right = options["window_size_left"], options["window_size_right"]
    assert all(limit is None or limit >= 0 for limit in (left, right))
    raw = torch.einsum("bqhd,bkhd->bhqk", q, k) * options["softmax_scale"]
    cap = options["softcap"]
    scores = cap * torch.tanh(raw / cap) if cap else raw
    row, col = (torch.arange(length) for length in scores.shape[-2:])
    before = row[:, None] + cols - rows - col
    visible = (row[:, None] < rows) & (col < cols)
    if left is not None:
        visible &= before <= left
    if right is not None:
        visible &= -before <= right
    return raw, scores, visible


def batched(*tensors: Tensor, packed: bool) -> list[Tensor]:
    return [x.unsqueeze(0) if packed else x for x in tensors]


def library_forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    packed = "cu_seqlens_q" in options
    out, lse = q.new_empty(*q.shape[:-1], v.shape[-1]), None
    spans = zip(
        sequences(q, options.get("cu_seqlens_q")),
        sequences(k, options.get("cu_seqlens_k")),
        strict=True,
    )
    q, k, v, outs = batched(q, k, v, out, packed=packed)
    groups = q.shape[2] // k.shape[2]
    lse = q.new_empty(
        q.shape[0], q.shape[2], q.shape[1], dtype=torch.promote_types(q.dtype, torch.float32)
    )
    for at_q, at_k in spans:
        rows, cols = at_q.stop - at_q.start, at_k.stop - at_k.start
        keys, values = (
            x[:, block(at_k, k.shape[1])].repeat_interleave(groups, 2).to(lse.dtype) for x in (k, v)
        )
        queries = q[:, block(at_q, q.shape[1])].to(lse.dtype)
        _, scores, visible = softmax(queries, keys, rows, cols, options)
        scores = scores.masked_fill(~visible, -torch.inf)
        found = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values)
        outs[:, at_q] = found[:, :rows].to(q.dtype)
        lse[:, :, at_q] = scores.logsumexp(-1)[:, :, :rows]
    return out, lse[0] if packed else lse


def library_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    packed = "cu_seqlens_q" in options
    spans = zip(
        sequences(q, options.get("cu_seqlens_q")),
        sequences(k, options.get("cu_seqlens_k")),
        strict=True,
    )
    given = [options[name] for name in ("dk", "dv")]
    made = [torch.empty_like(x) if y is None else y for x, y in zip((k, v), given, strict=True)]
    dq = torch.empty_like(q)
    q, k, v, out, dout, dqs, dks, dvs = batched(q, k, v, out, dout, dq, *made, packed=packed)
    lse, dlse = batched(lse, options["dlse"], packed=packed)
    groups, high = q.shape[2] // k.shape[2], lse.dtype
    for at_q, at_k in spans:
        rows, cols = at_q.stop - at_q.start, at_k.stop - at_k.start
        wide_q, wide_k = block(at_q, q.shape[1]), block(at_k, k.shape[1])
        keys, values = (x[:, wide_k].repeat_interleave(groups, 2).to(high) for x in (k, v))
        queries, grads, outs = (x[:, wide_q].to(high) for x in (q, dout, out))
        raw, scores, visible = softmax(queries, keys, rows, cols, options)
        weights = (scores - lse[:, :, wide_q, None]).exp().masked_fill(~visible, 0)
        delta = (grads * outs).sum(-1).transpose(1, 2) - dlse[:, :, wide_q]
        dscores = torch.einsum("bqhd,bkhd->bhqk", grads, values) - delta.unsqueeze(-1)
        dscores = (weights * dscores).masked_fill(~visible, 0) * options["softmax_scale"]
        if options["softcap"]:
            dscores *= 1 - (raw / options["softcap"]).tanh().square()
        sums = (
            torch.einsum("bhqk,bkhd->bqhd", dscores, keys)[:, :rows],
            torch.einsum("bhqk,bqhd->bkhd", dscores, queries).unflatten(2, (-1, groups)).sum(3),
            torch.einsum("bhqk,bqhd->bkhd", weights, grads).unflatten(2, (-1, groups)).sum(3),
        )
        for x, at, found in zip((dqs, dks, dvs), (at_q, at_k, at_k), sums, strict=True):
            x[:, at] = found[:, : at.stop - at.start].to(x.dtype)
    return dq, made[0], made[1]


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash4, "_library", lambda: (library_forward, library_backward))


WAYS = ("one step", "strided views", "gradients of keys in q's dtype", "keys cut anywhere")


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("how", WAYS)
def test_the_calls_add_up_to_unsharded_attention_and_never_read_hidden_slots(how: str) -> None:
    checked: list[Problem] = list(problems(torch.float64, "cpu"))
    exact = [dense(problem, torch.float64) for problem in checked]
    assert max(farthest([results(flash4, problem, how) for problem in checked], exact)) < 1e-12


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("how", WAYS)
def test_results_in_low_precision_have_its_dtype_and_are_near(how: str) -> None:
    checked: list[Problem] = list(problems(torch.bfloat16, "cpu"))
    exact = [dense(problem, torch.float64) for problem in checked]
    found = [results(flash4, problem, how) for problem in checked]
    assert {(out.dtype, lse.dtype, dq.dtype) for out, lse, dq, *_ in found} == {
        (torch.bfloat16, torch.float32, torch.bfloat16)
    }
    assert max(farthest(found, exact)) < 0.2


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (Call("cpu", torch.bfloat16, 64, 64), "on CUDA, not on cpu"),
        (Call("cuda", torch.float32, 64, 64), r"not in torch\.float32"),
        (Call("cuda", torch.bfloat16, 60, 60), r"not \(60, 60\)"),
        (Call("cuda", torch.bfloat16, 264, 264), r"not \(264, 264\)"),
        (Call("cuda", torch.bfloat16, 64, 128), r"not \(64, 128\)"),
        (Call("cuda", torch.bfloat16, 128, 96), r"not \(128, 96\)"),
        (Call("cuda", torch.bfloat16, 80, 80), "dq is wrong for a head dim of 80"),
        (Call("cuda", torch.bfloat16, 192, 128), r"not \(192, 128\)"),
        (Call("cuda", torch.bfloat16, 64, 64, scale=-1.0), "positive scale"),
    ],
)
def test_a_refusal_says_why(call: Call, reason: str) -> None:
    found = flash4.refusal(call)
    assert found is not None and re.search(reason, found)


@pytest.mark.gpu
def test_hundreds_of_documents_are_as_exact_as_few() -> None:
    """Above 256 sequences the library looks them up in another way."""
    random = Random(0)
    cuts = [0, *accumulate(random.choice([1, 2, 3, 20]) for _ in range(600))]
    regions = masks.documents(cuts).regions(cuts[-1])
    for name in ("contiguous", "striped"):
        shards = layout.shards(cuts[-1], 2, name)
        for keys in shards:
            problem = Problem(
                regions, shards[0], keys, (4, 2), (64, 64), 0.125, None, torch.bfloat16, "cuda", 0
            )
            if flash4.refusal(problem.call()) is not None:
                pytest.skip("flash4 does not serve this machine")
            if problem.tiles:
                exact = dense(problem, torch.float64)
                errors, own = (
                    farthest([found], [exact])
                    for found in (results(flash4, problem), dense(problem, torch.bfloat16))
                )
                assert all(x <= 3 * y for x, y in zip(errors, own, strict=True))
