"""Every kernel against unsharded attention, with NaN in all that it must not read."""

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from oracle import attention
from problems import dense, farthest, results, served
from ringed import relative

from ring_sp import kernels
from ring_sp.kernels import KERNELS, Call, Kernel, reference, select
from ring_sp.kernels.contract import Rows, State
from ring_sp.kernels.merge import merge

RESULTS = ("out", "lse", "dq", "dk", "dv")
CALL = Call("cpu", torch.float32, 64, 64)
DTYPES = [torch.float64, torch.float32, torch.bfloat16]

each_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_kernel = pytest.mark.parametrize("name", KERNELS)


@each_device
@each_dtype
@each_kernel
def test_is_as_exact_as_unsharded_attention_in_its_dtype(
    name: str, dtype: torch.dtype, device: str
) -> None:
    checked = served(KERNELS[name], dtype, device)
    exact = [dense(problem, torch.float64) for problem in checked]
    rounding = farthest([dense(problem, dtype) for problem in checked], exact)
    # Every further step rounds the state once more, and the gradients read it.
    ways = ("one step", 3), ("strided views", 3), ("gradients of keys in q's dtype", 3)
    for how, slack in (*ways, ("keys cut anywhere", 6)):
        errors = farthest([results(KERNELS[name], problem, how) for problem in checked], exact)
        for result, error, own in zip(RESULTS, errors, rounding, strict=True):
            assert error <= slack * own + 5e-14, f"{result}, {how}"


@each_device
@each_dtype
@each_kernel
def test_padding_poisoned_with_nan_leaves_results_empty_and_gradients_zero(
    name: str, dtype: torch.dtype, device: str
) -> None:
    checked = served(KERNELS[name], dtype, device)
    assert any(not problem.visible().any(axis).all() for problem in checked for axis in (0, 1))
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    for problem in checked:
        visible = problem.visible()
        for how in ("one step", "keys cut anywhere"):
            out, lse, dq, dk, dv = results(KERNELS[name], problem, how)
            rows, cols = ~visible.any(1), ~visible.any(0)
            assert {out.dtype, dq.dtype} == {dtype} and lse.dtype == accumulation
            assert (lse[:, :, rows] == -torch.inf).all() and lse[:, :, ~rows].isfinite().all()
            for x, hidden in ((out, rows), (dq, rows), (dk, cols), (dv, cols)):
                assert (x[:, hidden] == 0).all() and x.isfinite().all()


@each_device
@each_dtype
@each_kernel
def test_dq_is_added_to_and_dkv_is_overwritten(name: str, dtype: torch.dtype, device: str) -> None:
    kernel = KERNELS[name]
    for problem in served(kernel, dtype, device):
        q, k, v, dout, _ = problem.tensors()
        last, parts = problem.step(problem.kv_shard), (torch.empty_like(k), torch.empty_like(v))
        first = replace(last, final=False)
        out, lse = kernel.forward(q, k, v, last, None)
        rows = Rows(out, lse, dout)
        once = kernel.backward(q, (k, v), rows, last, None, parts).clone()
        before = [x.clone() for x in parts]
        dq = kernel.backward(q, (k, v), rows, first, None, parts)
        torch.testing.assert_close(kernel.backward(q, (k, v), rows, last, dq, parts), 2 * once)
        # Some sum in any order, so that a bf16 may be its neighbour.
        torch.testing.assert_close(list(parts), before, rtol=2e-2, atol=1e-3)


def test_blocks_of_rows_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = served(reference, torch.float64, "cpu")
    whole = [results(reference, problem) for problem in checked]
    for rows in (1, 3):
        monkeypatch.setattr(reference, "BLOCK_ROWS", rows)
        assert max(farthest([results(reference, problem) for problem in checked], whole)) < 5e-14


def state(seed: int, spread: float, dtype: torch.dtype) -> State:
    """An (out, lse) of random rows, some of which have seen nothing."""
    make = torch.Generator().manual_seed(seed)
    out = torch.randn(2, 12, 3, 4, generator=make, dtype=dtype)
    lse = torch.randn(2, 3, 12, generator=make, dtype=dtype) * spread
    empty = torch.rand(2, 3, 12, generator=make) < 0.4
    return out.masked_fill(empty.mT.unsqueeze(-1), 0), lse.masked_fill(empty, -torch.inf)


@pytest.mark.parametrize("spread", [1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_merge_is_associative_and_commutative_with_an_identity(
    spread: float, dtype: torch.dtype
) -> None:
    a, b, c = (state(seed, spread, dtype) for seed in range(3))
    nothing = torch.zeros_like(a[0]), torch.full_like(a[1], -torch.inf)
    left, right = merge(*merge(*a, *b), *c), merge(*a, *merge(*b, *c))
    for mine, other in zip(left, right, strict=True):
        assert relative(mine, other) < 8 * torch.finfo(dtype).eps * max(1.0, spread)
    same = [(merge(*a, *b), merge(*b, *a)), (merge(*nothing, *nothing), nothing)]
    for found, wanted in [*same, (merge(*a, *nothing), a), (merge(*nothing, *a), a)]:
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_merge_of_two_sets_of_keys_is_attention_over_their_union() -> None:
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 9, 3, 4, generator=make, dtype=torch.float64) for _ in range(3))
    union = torch.rand(9, 9, generator=make) < 0.5
    union[4] = False
    first = torch.rand(9, 9, generator=make) < 0.5
    found = merge(*attention(q, k, v, union & first), *attention(q, k, v, union & ~first))
    for mine, true in zip(found, attention(q, k, v, union), strict=True):
        assert relative(mine, true) < 1e-14


def fake(reason: str | None) -> Kernel:
    return cast(Kernel, SimpleNamespace(refusal=lambda _: reason))


def test_auto_takes_the_first_kernel_that_does_not_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = fake("too small"), fake(None), fake(None)
    monkeypatch.setattr(kernels, "KERNELS", {"a": first, "b": second, "c": third})
    assert select("auto", CALL) is second and select("c", CALL) is third


def test_a_refusal_names_the_kernel_and_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "KERNELS", {"a": fake("too small"), "b": fake("too cold")})
    with pytest.raises(ValueError, match=r"Call\(.*a: too small; b: too cold$"):
        select("auto", CALL)
    with pytest.raises(ValueError, match=r"Call\(.*: b: too cold$"):
        select("b", CALL)
    with pytest.raises(ValueError, match="one of auto, a, b; got 'fast'"):
        select("fast", CALL)


def test_the_reference_serves_whatever_floats() -> None:
    for dtype in [*DTYPES, torch.float16]:
        assert select("reference", replace(CALL, dtype=dtype, softcap=True)) is KERNELS["reference"]
    with pytest.raises(ValueError, match=r"floating point, not torch\.int64"):
        select("reference", replace(CALL, dtype=torch.int64))
