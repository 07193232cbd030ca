"""The laws of test_attention.py on GPUs over NCCL: `bash tests/run.sh --gpu`."""

from dataclasses import replace

import pytest
import torch
from conftest import World
from ranks import groups
from ringed import Case, assert_exact, inputs, relative, repeats
from visibility import cases

from ring_sp import ShardedSequence, layout, ring_attention
from ring_sp.kernels import KERNELS, Call

pytestmark = pytest.mark.gpu


Sizes = dict[str, int]


def topologies() -> list[Sizes]:
    """Ways to spread a sequence over the GPUs at hand."""
    size = torch.cuda.device_count()
    split = [{"ring": size // 2, name: 2} for name in ("ulysses", "outer") if size % 2 == 0]
    able = [sizes for sizes in split if sizes["ring"] > 1 or "ulysses" in sizes]
    nested = [{**sizes, "copies": 1} for sizes in able if "outer" in sizes]
    together = [
        {**sizes, "gather": number} for sizes in (*able, {"ring": size}) for number in (1, 2)
    ]
    gathers = [sizes for sizes in together if "outer" not in sizes and sizes["ring"] > 1]
    return [{"ring": size, "copies": 1}, {"ring": size}, *able, *nested, *gathers]


each_exchange = pytest.mark.parametrize("how", [{}, {"copies": 1}, {"gather": 2}], ids=str)


def test_a_ring_that_stops_early_may_be_the_first_to_speak(gpu_world: World) -> None:
    """NCCL wants all ranks in the first call of a communicator; rank 0 here receives nothing."""
    sizes = {"ring": torch.cuda.device_count()}
    assert_exact(gpu_world, sizes, [Case("window", "contiguous", seq_len=64)], bound=1e-11)


@pytest.mark.parametrize("sizes", topologies(), ids=str)
def test_equals_unsharded_attention(gpu_world: World, sizes: Sizes) -> None:
    every = [
        Case(mask, name, seq_len)
        for mask, seq_len in zip(cases(24), [29, 24, 37, 31] * 9, strict=False)
        for name in layout.LAYOUTS
    ]
    assert_exact(gpu_world, sizes, [*every, Case(sinks=True, softcap=2.0), Case(kv_len=47)], 1e-11)


@each_exchange
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_low_precision_is_near(
    gpu_world: World, dtype: torch.dtype, bound: float, how: Sizes
) -> None:
    asked = ("causal", "documents", "spans", "window")
    low = [Case(mask, dtype=dtype, seq_len=96) for mask in asked]
    low += [Case(mask, dtype=dtype, seq_len=700, head_dim=64, v_head_dim=64) for mask in asked]
    assert_exact(gpu_world, {"ring": torch.cuda.device_count(), **how}, low, bound)


@each_exchange
@pytest.mark.parametrize("name", KERNELS)
def test_each_kernel_is_near_and_repeats_its_bits(gpu_world: World, name: str, how: Sizes) -> None:
    call, refusal = Call("cuda", torch.bfloat16, 64, 64), KERNELS[name].refusal
    if reason := refusal(call):
        pytest.skip(reason)
    sizes = {"ring": torch.cuda.device_count(), **how}
    lse = not refusal(replace(call, lse_gradient=True))
    shape = Case(seq_len=700, head_dim=64, v_head_dim=64, dtype=torch.bfloat16, kernel=name)
    shape = replace(shape, lse=lse)
    assert_exact(gpu_world, sizes, [shape, replace(shape, mask="documents")], 3e-2)
    # torch's flash does so only where its deterministic mode does not merely warn.
    if not refusal(replace(call, deterministic=True)) and name != "flash":
        assert all(gpu_world.run(repeats, sizes, shape))


def turns(hows: list[Sizes]) -> float:
    """How far rings that differ in their exchange alone are apart, over many turns in each of which
    the next has its own.
    """
    case = Case(seq_len=4096, heads=(8, 2), head_dim=64, v_head_dim=64, dtype=torch.bfloat16)
    (q, k, v, _), _ = inputs(case, 0)
    first: list[torch.Tensor] = []
    apart = 0.0
    torch.use_deterministic_algorithms(True)
    for turn in range(20):
        ring = groups(ring=torch.cuda.device_count(), **hows[turn % len(hows)])
        place = ShardedSequence(4096, ring.topology)
        parts = [place.shard(x.detach()).requires_grad_() for x in (q, k, v)]
        out = ring_attention(*parts, place)  # type: ignore[call-overload]
        found = [out, *torch.autograd.grad(out.square().sum(), parts)]
        first = first or found
        if not all(map(torch.equal, first, found)):
            apart = max(apart, *(relative(a, b) for a, b in zip(found, first, strict=True)))
    torch.use_deterministic_algorithms(False)
    return apart


def test_copies_give_the_bits_of_messages(gpu_world: World) -> None:
    assert max(gpu_world.run(turns, [{}, {"copies": 1}, {"copies": 1}])) == 0.0


def test_a_gather_gives_its_own_bits_again_and_near_those_of_messages(gpu_world: World) -> None:
    assert max(gpu_world.run(turns, [{"gather": 2}])) == 0.0
    assert max(gpu_world.run(turns, [{}, {"gather": 1}, {"gather": 2}])) < 2e-2


def replayed(how: Sizes) -> float:
    """How far a captured forward and backward, replayed on other numbers, is from an eager one."""
    case = Case(seq_len=700, head_dim=64, v_head_dim=64, dtype=torch.bfloat16)
    ring = groups(ring=torch.cuda.device_count(), **how)
    place = ShardedSequence(700, ring.topology)
    (q, k, v, _), _ = inputs(case, 0)
    parts = [place.shard(x.detach()).requires_grad_() for x in (q, k, v)]

    def step() -> list[torch.Tensor]:
        out = ring_attention(*parts, place)  # type: ignore[call-overload]
        return [out, *torch.autograd.grad(out.square().sum(), parts)]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for part in parts:
        part.data.mul_(0.7)
    graph.replay()
    return max(relative(a, b) for a, b in zip(captured, step(), strict=True))


@each_exchange
def test_a_step_can_be_captured_in_a_graph(gpu_world: World, how: Sizes) -> None:
    assert max(gpu_world.run(replayed, how)) < 1e-2


@pytest.mark.parametrize("name", KERNELS)
def test_a_gpu_that_is_not_the_current_one_gives_the_same(name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    reason = KERNELS[name].refusal(Call("cuda", torch.bfloat16, 64, 64))
    if reason:
        pytest.skip(reason)
    found, seq = [], ShardedSequence(300)
    for device in range(2):
        torch.manual_seed(0)
        q, k, v, dout = (
            torch.randn(1, 300, 4, 64).to(f"cuda:{device}", torch.bfloat16) for _ in range(4)
        )
        trained = [x.requires_grad_() for x in (q, k, v)]
        out = ring_attention(q, k, v, seq, kernel=name)
        found.append([x.cpu() for x in (out, *torch.autograd.grad(out, trained, dout))])
    for here, there in zip(*found, strict=True):
        assert relative(there, here) < 2e-2
