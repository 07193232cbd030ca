"""The Triton kernels: on a GPU, and on the CPU in Triton's interpreter, in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle, pairwise
from pathlib import Path

import pytest
import torch
from problems import dense, farthest, problems, results
from ringed import relative

from ring_sp.kernels import Call, Step, reference, triton
from ring_sp.kernels.contract import Rows, State
from ring_sp.kernels.dropout import Dropout
from ring_sp.kernels.merge import merge
from ring_sp.regions import Tile

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
WAYS = ("one step", "strided views", "gradients of keys in q's dtype", "keys cut anywhere")

law: Callable[..., pytest.MarkDecorator] = (
    pytest.mark.filterwarnings("ignore::RuntimeWarning") if INTERPRETED else pytest.mark.gpu
)


@pytest.mark.skipif(INTERPRETED, reason="is the interpreted one")
def test_the_laws_hold_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture(params=[(16, 16, False), (32, 16, True)], ids=str)
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """So that a small problem has blocks of each kind; whether they are read by descriptors."""
    from ring_sp.kernels.triton_blocks import Shape

    rows, cols, descriptors = request.param
    shape = Shape(rows, cols, 4, 2, descriptors)
    monkeypatch.setattr(triton, "shapes", lambda *_: (shape,) * 3)
    return bool(descriptors)


@law
def test_is_as_exact_as_unsharded_attention(small_blocks: bool) -> None:
    """Half of the masks with each way to read."""
    checked = list(problems(torch.float32, DEVICE))[int(small_blocks) : 11 : 2]
    exact = [dense(problem, torch.float64) for problem in checked]
    rounding = farthest([dense(problem, torch.float32) for problem in checked], exact)
    found = [results(triton, *each) for each in zip(checked, cycle(WAYS), strict=False)]
    for error, own in zip(farthest(found, exact), rounding, strict=True):
        assert error <= 6 * own


Tensors = tuple[torch.Tensor, ...]


def tensors(rows: int, cols: int, dims: tuple[int, int], heads: int = 2) -> Tensors:
    """q, k, v, dout in float32."""
    make = torch.Generator().manual_seed(0)
    shapes = [
        (rows, heads, dims[0]),
        (cols, 1, dims[0]),
        (cols, 1, dims[1]),
        (rows, heads, dims[1]),
    ]
    made = [torch.randn(1, *shape, generator=make).to(DEVICE) for shape in shapes]
    return tuple(made)


def both_passes(kernel: object, inputs: Tensors, step: Step) -> list[torch.Tensor]:
    """out, lse, dq, dk, dv."""
    q, k, v, dout = inputs
    out, lse = kernel.forward(q, k, v, step, None)  # type: ignore[attr-defined]
    dkv = torch.full_like(k, torch.nan), torch.full_like(v, torch.nan)
    dq = kernel.backward(  # type: ignore[attr-defined]
        q, (k, v), Rows(out, lse, dout), step, None, dkv
    )
    return [out, lse, dq, *dkv]


def assert_same_as_reference(inputs: Tensors, tiles: list[Tile], scale: float = 0.3) -> None:
    step = Step(tuple(tiles), scale)
    for found, true in zip(
        both_passes(triton, inputs, step), both_passes(reference, inputs, step), strict=True
    ):
        torch.testing.assert_close(found, true, rtol=2e-5, atol=2e-5)


@law
@pytest.mark.usefixtures("small_blocks")
def test_takes_many_short_documents() -> None:
    cuts = [0, *torch.arange(60).remainder(5).add(1).cumsum(0).tolist()]
    tiles = [Tile(a, b, a, b, 0, b - a - 1) for a, b in pairwise(cuts)]
    assert_same_as_reference(tensors(cuts[-1], cuts[-1], (16, 16), heads=1), tiles)


@law
@pytest.mark.usefixtures("small_blocks")
def test_takes_rows_that_meet_many_tiles() -> None:
    """With NaN in what no tile holds, and scores that fall where q.k rises."""
    full, band = Tile(0, 70, 40, 75, -34, 69), Tile(3, 70, 0, 37, -5, 40)
    tiles = [full, band, Tile(5, 9, 81, 120, -38, 3), Tile(9, 41, 81, 120, -8, 6)]
    q, k, v, dout = inputs = tensors(75, 130, (16, 16))
    for x in (q, dout):
        x[:, 70:] = torch.nan
    for x in (k, v):
        x[:, 37:40], x[:, 75:81], x[:, 120:] = (torch.nan,) * 3
    assert_same_as_reference(inputs, tiles, scale=-0.3)


@law
@pytest.mark.usefixtures("small_blocks")
def test_drops_what_the_reference_drops() -> None:
    """Some heads of several batch entries, at positions with gaps."""
    q, k, v, dout = (torch.cat([x, x.flip(1)]) for x in tensors(50, 70, (16, 16), heads=4))
    q, dout = q[:, :50], dout[:, :50]
    q_at, k_at = (torch.arange(n, dtype=torch.int32, device=DEVICE) * 2 + 1 for n in (50, 70))
    dropout = Dropout(0.3, 0x123456789ABCDE, q_at, k_at, 4, 12)
    tiles = Tile(0, 50, 0, 50, 0, 49), Tile(10, 50, 50, 70, -19, 39)
    step = Step(tiles, 0.3, dropout=dropout)
    found, true = (both_passes(kernel, (q, k, v, dout), step) for kernel in (triton, reference))
    for mine, other in zip(found, true, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-5)
    plain = both_passes(triton, (q, k, v, dout), replace(step, dropout=None))
    torch.testing.assert_close(found[1], plain[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[0], plain[0], rtol=0.1, atol=0.1)


@law
@pytest.mark.parametrize("dims", [(256, 256), (24, 40), (192, 128)], ids=str)
def test_takes_head_dims_that_are_no_power_of_two(dims: tuple[int, int]) -> None:
    assert_same_as_reference(tensors(40, 40, dims), [Tile(0, 40, 0, 40, 0, 39)])


@law
@pytest.mark.parametrize("dim", [32, 128])
def test_gives_the_same_bits_twice(dim: int) -> None:
    inputs = tuple(x.to(torch.float16) for x in tensors(152, 152, (dim, dim)))
    step = Step((Tile(0, 152, 0, 152, 0, 151),), 0.1)
    first, second = (both_passes(triton, inputs, step) for _ in range(2))
    assert all(map(torch.equal, first, second))
    for found, true in zip(first, both_passes(reference, inputs, step), strict=True):
        assert relative(found, true) < 2e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (128, 64), (192, 128)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_takes_long_rows_in_steps(dtype: torch.dtype, dims: tuple[int, int]) -> None:
    """Documents whose keys come in two pieces, with NaN between and after them."""
    inputs = [x.to(dtype) for x in tensors(1000, 1000, dims, heads=4)]
    cuts = [(3, 300), (300, 310), (310, 901), (930, 990)]
    hidden = torch.ones(1000, dtype=torch.bool, device=DEVICE)
    for start, stop in cuts:
        hidden[start:stop] = False
    for x in inputs:
        x[:, hidden] = torch.nan
    early = Step(tuple(Tile(a, b, a, b, 0, b - a - 1) for a, b in cuts), 0.1, final=False)
    late = Step((Tile(310, 901, 3, 300, -296, 590),), 0.1)
    outcome = []
    for kernel, kind in (triton, dtype), (reference, torch.float64):
        a, b, c, d = (torch.nan_to_num(x).to(kind) for x in inputs) if kind != dtype else inputs
        state = kernel.forward(a, b, c, early, None)
        out, lse = kernel.forward(a, b, c, late, state)
        seen, dq, parts = Rows(out, lse, d), None, []
        for step in early, late:
            dkv = torch.empty_like(b, dtype=lse.dtype), torch.empty_like(c, dtype=lse.dtype)
            dq = kernel.backward(a, (b, c), seen, step, dq, dkv)
            parts.append(dkv)
        outcome.append([out, lse, dq, *(x + y for x, y in zip(*parts, strict=True))])
    for found, true in zip(*outcome, strict=True):
        assert torch.equal(found.isfinite(), true.isfinite())
        assert relative(*(x.masked_fill(x.isinf(), 0).double() for x in (found, true))) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1000, 998], ids=str)
@pytest.mark.parametrize("scale", [0.1, -0.1], ids=str)
def test_takes_tiles_of_each_kind_in_half_precision(rows: int, scale: float) -> None:
    """A band some of whose keys no query sees, and blocks of queries and keys that meet two tiles,
    with NaN in what no tile holds.
    """
    inputs = [x.to(torch.bfloat16) for x in tensors(rows, 1300, (128, 128), heads=4)]
    tiles = (
        Tile(0, 250, 0, 700, -5, 1000),
        Tile(250, 500, 333, 540, -1000, 1000),
        Tile(500, 990, 0, 901, -1000, -333),
        Tile(500, 990, 903, 1203, 0, 200),
    )
    for x, hidden in zip(inputs, (990, 1203, 1203, 990), strict=True):
        x[:, hidden:] = torch.nan
    step = Step(tiles, scale)
    true = both_passes(reference, tuple(torch.nan_to_num(x.double()) for x in inputs), step)
    for found, exact in zip(both_passes(triton, tuple(inputs), step), true, strict=True):
        assert torch.equal(found.isfinite(), exact.isfinite())
        assert relative(*(x.masked_fill(x.isinf(), 0).double() for x in (found, exact))) < 1e-2


@pytest.mark.skipif(INTERPRETED, reason="interprets no Gluon")
def test_the_hopper_backward_serves_what_its_copies_can_reach() -> None:
    pytest.importorskip("triton.experimental.gluon")
    from ring_sp.kernels import triton_hopper_backward

    def serves(rows: int = 152, dim: int = 128, offset: int = 0, cap: float | None = None) -> bool:
        q, k, v, dout = (
            torch.zeros(1, rows, heads, size, dtype=torch.bfloat16)
            for heads, size in ((2, dim), (1, dim), (1, 128), (2, 128))
        )
        lse = torch.zeros(offset + 2 * rows)[offset:].view(1, 2, rows)
        step = Step((Tile(0, rows, 0, rows, 0, rows - 1),), 0.3, cap)
        return triton_hopper_backward.serves(dout, q, (k, v), (lse, lse), step)

    assert serves() and serves(dim=64)
    assert not (serves(rows=150) or serves(dim=96) or serves(offset=1) or serves(cap=3.0))


@law
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_finds_the_largest_scores(dtype: torch.dtype, small_blocks: bool) -> None:
    """Keys in pieces, with NaN in all slots that nobody may read."""
    from ring_sp.kernels import row_max

    for problem in list(problems(dtype, DEVICE))[int(small_blocks) : 11 : 2]:
        q, k, *_ = problem.tensors()
        rows, cols = (~problem.visible().any(axis)[:, None, None] for axis in (1, 0))
        found = torch.full((2, q.shape[2], q.shape[1]), -torch.inf, device=DEVICE)
        true = found.double()
        for at, step in replace(problem, softcap=None).steps():
            pieces = q.masked_fill(rows, torch.nan), k.masked_fill(cols, torch.nan)[:, at]
            row_max.fold(*pieces, step, found)
            row_max.fold(q.double(), k[:, at].double(), step, true)
        assert relative(found.double(), true) < 1e-6


def part(rows: int, seed: int) -> State:
    """An (out, lse), some of whose rows have seen nothing."""
    make = torch.Generator().manual_seed(seed)
    out, lse = torch.randn(2, rows, 3, 24, generator=make), torch.randn(2, 3, rows, generator=make)
    empty = torch.rand(2, 3, rows, generator=make) < 0.3
    out, lse = out.masked_fill(empty.mT.unsqueeze(-1), 0), lse.masked_fill(empty, -torch.inf)
    return out.to(DEVICE), lse.to(DEVICE)


@law
@pytest.mark.parametrize("rows", [slice(0, 90), slice(7, 80)], ids=str)
def test_fold_is_merge(rows: slice) -> None:
    from ring_sp.kernels.triton_merge import fold

    nothing = (
        torch.zeros(2, 90, 3, 24, device=DEVICE),
        torch.full((2, 3, 90), -torch.inf).to(DEVICE),
    )
    first, second = part(rows.stop - rows.start, 0), part(rows.stop - rows.start, 1)
    true = tuple(x.clone() for x in nothing)
    true[0][:, rows], true[1][:, :, rows] = first
    state = fold(None, first, rows, 90, torch.float32)
    torch.testing.assert_close(state, true)
    true[0][:, rows], true[1][:, :, rows] = merge(*first, *second)
    out, lse = second
    strided = out.transpose(1, 2).contiguous().transpose(1, 2), lse.mT.contiguous().mT
    found = fold((state[0].clone(), state[1].clone()), strided, rows, 90, torch.float32)
    torch.testing.assert_close(found, true)
    turned = state[0].transpose(1, 2).contiguous().transpose(1, 2), state[1]
    low = fold(turned, (out.to(torch.bfloat16), lse), rows, 90, torch.bfloat16)
    assert low[0].dtype == torch.bfloat16
    torch.testing.assert_close(low[0].float(), true[0], rtol=2e-2, atol=2e-2)


def test_refuses_what_it_cannot_run() -> None:
    pytest.importorskip("triton")
    call = Call("cuda", torch.float16, 128, 128)
    assert triton.refusal(call) is None
    for other, reason in [
        (replace(call, dtype=torch.float64), "not torch.float64"),
        (replace(call, v_head_dim=257), "head dims to 256, not 128 and 257"),
        (replace(call, device_type="xpu"), "not on xpu"),
    ]:
        assert reason in str(triton.refusal(other)) or (INTERPRETED and other.device_type == "xpu")
