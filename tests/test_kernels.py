"""Every kernel against unsharded attention, with NaN in all that it must not read."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from oracle import attention
from ringed import relative
from torch import Tensor
from visibility import cases

from ring_sp import kernels, layout
from ring_sp.kernels import KERNELS, Call, Kernel, Step, reference, select
from ring_sp.kernels.contract import State, accumulation_dtype
from ring_sp.kernels.merge import merge
from ring_sp.layout import Shard, shard_len
from ring_sp.regions import Regions

RESULTS = ("out", "lse", "dq", "dk", "dv")
HEADS = [(2, 2), (4, 2), (4, 1), (6, 3)]
DIMS = [(8, 8), (16, 8), (16, 32), (64, 64)]
CALL = Call("cpu", torch.float32, 64, 64)
DTYPES = [torch.float64, torch.float32, torch.bfloat16]

each_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_kernel = pytest.mark.parametrize("name", KERNELS)


@dataclass(frozen=True)
class Problem:
    """Queries of one shard that meet the keys of another."""

    regions: Regions
    q_shard: Shard
    kv_shard: Shard
    heads: tuple[int, int]
    dims: tuple[int, int]
    scale: float
    softcap: float | None
    dtype: torch.dtype
    device: str
    seed: int

    def step(self, keys: Shard) -> Step:
        return Step(tuple(self.regions.tiles(self.q_shard, keys)), self.scale, self.softcap)

    def steps(self) -> list[tuple[slice, Step]]:
        """The keys cut into pieces, anywhere; those that somebody sees."""
        random, found, at = Random(self.seed), [], 0
        for span in self.kv_shard:
            cuts = sorted({0, len(span), *random.choices(range(len(span)), k=2)})
            for start, stop in pairwise(cuts):
                step = self.step((span[start:stop],))
                if step.tiles:
                    found.append((slice(at + start, at + stop), step))
            at += len(span)
        last = len(found) - 1
        return [(at, replace(step, final=n == last)) for n, (at, step) in enumerate(found)]

    def visible(self) -> Tensor:
        """bool [Sq, Sk], by the definition of a tile."""
        seen = torch.zeros(shard_len(self.q_shard), shard_len(self.kv_shard), dtype=torch.bool)
        for tile in self.step(self.kv_shard).tiles:
            rows = torch.arange(tile.q_stop - tile.q_start)[:, None]
            offset = rows - torch.arange(tile.k_stop - tile.k_start)
            band = (tile.lo <= offset) & (offset <= tile.hi)
            seen[tile.q_start : tile.q_stop, tile.k_start : tile.k_stop] |= band
        return seen.to(self.device)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, dout in the dtype of the problem, dlse in that of accumulation."""
        make = torch.Generator().manual_seed(self.seed)
        (heads, kv_heads), (dim, v_dim) = self.heads, self.dims
        rows, cols = shard_len(self.q_shard), shard_len(self.kv_shard)
        keys, values = (cols, kv_heads, dim), (cols, kv_heads, v_dim)
        shapes = [(rows, heads, dim), keys, values, (rows, heads, v_dim), (heads, rows)]
        made = [torch.randn(2, *shape, generator=make, dtype=torch.float64) for shape in shapes]
        q, k, v, dout = (x.to(self.device, self.dtype) for x in made[:4])
        return q, k, v, dout, made[4].to(self.device, accumulation_dtype(self.dtype))


def problems(dtype: torch.dtype, device: str) -> Iterator[Problem]:
    """Two shards of every mask, with tiles of all shapes."""
    random = Random(0)
    for number in range(4):
        for mask in cases(40):
            seq_len, size = random.randint(12, 40), random.randint(1, 3)
            shards = layout.shards(seq_len, size, random.choice(list(layout.LAYOUTS)))
            dims = random.choice(DIMS)
            scale = random.choice([1, 2]) * dims[0] ** -0.5
            regions, softcap = cases(seq_len)[mask][0].regions(seq_len), random.choice([None, 1.5])
            heads, two = random.choice(HEADS), (random.choice(shards), random.choice(shards))
            problem = Problem(regions, *two, heads, dims, scale, softcap, dtype, device, number)
            if problem.step(problem.kv_shard).tiles:
                yield problem


def served(kernel: Kernel, dtype: torch.dtype, device: str) -> list[Problem]:
    """The problems that a kernel does not refuse."""

    def refused(each: Problem) -> str | None:
        return kernel.refusal(Call(device, dtype, *each.dims, each.softcap is not None))

    found = [each for each in problems(dtype, device) if not refused(each)]
    if not found:
        pytest.skip(f"{kernel.__name__} serves no {dtype} on {device}")
    return found


def results(kernel: Kernel, problem: Problem, how: str = "one step") -> list[Tensor]:
    """out, lse, dq, dk, dv of a kernel, with NaN in all slots that nobody may read."""
    q, k, v, dout, dlse = problem.tensors()
    visible = problem.visible()
    rows, cols = (~visible.any(axis)[:, None, None] for axis in (1, 0))
    q, dout = (x.masked_fill(rows, torch.nan) for x in (q, dout))
    k, v = (x.masked_fill(cols, torch.nan) for x in (k, v))
    if how == "strided views":
        q, k, v, dout = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, dout))
    whole = [(slice(None), problem.step(problem.kv_shard))]
    steps = problem.steps() if how == "keys cut anywhere" else whole
    state = None
    for at, step in steps:
        state = kernel.forward(q, k[:, at], v[:, at], step, state)
    assert state is not None
    out, lse = state
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1).transpose(1, 2) - dlse
    dtype = q.dtype if how == "gradients of keys in q's dtype" else lse.dtype
    dq, dk, dv = None, torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
    for at, step in steps:
        parts = torch.full_like(dk[:, at], torch.nan), torch.full_like(dv[:, at], torch.nan)
        dq = kernel.backward(dout, q, (k[:, at], v[:, at]), (lse, delta), step, dq, parts)
        dk[:, at], dv[:, at] = parts
    assert dq is not None
    return [out, lse, dq, dk, dv]


def dense(problem: Problem, dtype: torch.dtype) -> list[Tensor]:
    """The same from unsharded attention computed in a dtype."""
    *inputs, dout, dlse = (x.to(dtype) for x in problem.tensors())
    q, k, v = (x.requires_grad_() for x in inputs)
    out, lse = attention(q, k, v, problem.visible(), problem.scale, problem.softcap)
    finite = lse.masked_fill(lse.isinf(), 0)
    loss = (out * dout).sum() + (finite * dlse).sum()
    return [x.detach().double() for x in (out, lse, *torch.autograd.grad(loss, (q, k, v)))]


def distance(mine: Tensor, true: Tensor) -> float:
    """The largest difference; infinite unless both are finite in the same places."""
    if not torch.equal(mine.isfinite(), true.isfinite()):
        return torch.inf
    return (mine.double() - true.double()).masked_fill(true.isinf(), 0).abs().max().item()


def farthest(found: list[list[Tensor]], wanted: list[list[Tensor]]) -> list[float]:
    """The largest difference of each result over many problems."""
    differences = [map(distance, *pair) for pair in zip(found, wanted, strict=True)]
    return list(map(max, zip(*differences, strict=True)))


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
@each_kernel
def test_dq_is_added_to_and_dkv_is_overwritten(name: str, device: str) -> None:
    kernel, dtype = KERNELS[name], torch.float32
    for problem in served(kernel, dtype, device):
        q, k, v, dout, _ = problem.tensors()
        last, parts = problem.step(problem.kv_shard), (torch.empty_like(k), torch.empty_like(v))
        first = replace(last, final=False)
        _, lse = kernel.forward(q, k, v, last, None)
        rows = lse, torch.zeros_like(lse)
        once = kernel.backward(dout, q, (k, v), rows, last, None, parts).clone()
        before = [x.clone() for x in parts]
        dq = kernel.backward(dout, q, (k, v), rows, first, None, parts)
        torch.testing.assert_close(
            kernel.backward(dout, q, (k, v), rows, last, dq, parts), 2 * once
        )
        torch.testing.assert_close(list(parts), before)


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
