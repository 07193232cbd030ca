"""Problems for a kernel, and their answers by unsharded attention."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random

import pytest
import torch
from oracle import attention
from torch import Tensor
from visibility import cases

from ring_sp import layout
from ring_sp.kernels import Call, Kernel, Step
from ring_sp.kernels.contract import Rows, accumulation_dtype
from ring_sp.layout import Shard, shard_len
from ring_sp.regions import UNBOUNDED, Regions, Tile

HEADS = [(2, 2), (4, 2), (4, 1), (6, 3)]
DIMS = [(8, 8), (16, 8), (16, 32), (64, 64)]
COMPILED = [
    ((4, 2), (64, 64), None),
    ((2, 2), (128, 128), None),
    ((2, 2), (128, 64), None),
    ((4, 1), (128, 128), 1.5),
]
"""Heads, head dims and softcap on a GPU, where some backends compile a kernel for each."""


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
    lse_gradient: bool = True

    def call(self) -> Call:
        return Call(
            self.device,
            self.dtype,
            *self.dims,
            self.softcap is not None,
            self.scale,
            windowed=any(region.left < UNBOUNDED for region in self.regions),
            num_regions=len(self.tiles),
            lse_gradient=self.lse_gradient,
        )

    @property
    def tiles(self) -> tuple[Tile, ...]:
        return self.step(self.kv_shard).tiles

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
        for tile in self.tiles:
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
        dlse = made[4] * self.lse_gradient
        return q, k, v, dout, dlse.to(self.device, accumulation_dtype(self.dtype))


def problems(dtype: torch.dtype, device: str, lse_gradient: bool = True) -> Iterator[Problem]:
    """Two shards of every mask, with tiles of all shapes."""
    random = Random(0)
    for number in range(4):
        for mask in cases(40):
            seq_len, size = random.randint(12, 40), random.randint(1, 3)
            if device == "cuda":
                # Beyond the blocks of a kernel.
                seq_len *= 17
            shards = layout.shards(seq_len, size, random.choice(list(layout.LAYOUTS)))
            two = random.choice(shards), random.choice(shards)
            model = random.choice(HEADS), random.choice(DIMS), random.choice([None, 1.5])
            heads, dims, softcap = random.choice(COMPILED) if device == "cuda" else model
            scale = random.choice([1, 2]) * dims[0] ** -0.5
            regions = cases(seq_len)[mask][0].regions(seq_len)
            problem = Problem(regions, *two, heads, dims, scale, softcap, dtype, device, number)
            if problem.tiles:
                yield replace(problem, lse_gradient=lse_gradient)


def served(kernel: Kernel, dtype: torch.dtype, device: str) -> list[Problem]:
    """The problems that a kernel does not refuse."""

    found = []
    for each in problems(dtype, device):
        without = replace(each, lse_gradient=False)
        found += [p for p in (each, without) if kernel.refusal(p.call()) is None][:1]
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
    seen = Rows(out, lse, dout, dlse if problem.lse_gradient else None)
    dtype = q.dtype if how == "gradients of keys in q's dtype" else lse.dtype
    dq, dk, dv = None, torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
    for at, step in steps:
        parts = torch.full_like(dk[:, at], torch.nan), torch.full_like(dv[:, at], torch.nan)
        dq = kernel.backward(q, (k[:, at], v[:, at]), seen, step, dq, parts)
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
