"""The laws of test_attention.py on GPUs over NCCL: `bash tests/run.sh --gpu`."""

import pytest
import torch
from conftest import World
from ringed import Case, assert_exact
from visibility import cases

from ring_sp import layout

pytestmark = pytest.mark.gpu


def topologies() -> list[dict[str, int]]:
    """Ways to spread a sequence over the GPUs at hand."""
    size = torch.cuda.device_count()
    split = [{"ring": size // 2, name: 2} for name in ("ulysses", "outer") if size % 2 == 0]
    return [{"ring": size}, *(sizes for sizes in split if sizes["ring"] > 1 or "ulysses" in sizes)]


def test_a_ring_that_stops_early_may_be_the_first_to_speak(gpu_world: World) -> None:
    """NCCL wants all ranks in the first call of a communicator; rank 0 here receives nothing."""
    sizes = {"ring": torch.cuda.device_count()}
    assert_exact(gpu_world, sizes, [Case("window", "contiguous", seq_len=64)], bound=1e-11)


@pytest.mark.parametrize("sizes", topologies(), ids=str)
def test_equals_unsharded_attention(gpu_world: World, sizes: dict[str, int]) -> None:
    every = [
        Case(mask, name, seq_len)
        for mask, seq_len in zip(cases(24), [29, 24, 37, 31] * 9, strict=False)
        for name in layout.LAYOUTS
    ]
    assert_exact(gpu_world, sizes, [*every, Case(sinks=True, softcap=2.0), Case(kv_len=47)], 1e-11)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_low_precision_is_near(gpu_world: World, dtype: torch.dtype, bound: float) -> None:
    asked = ("causal", "documents", "spans", "window")
    low = [Case(mask, dtype=dtype, seq_len=96) for mask in asked]
    low += [Case(mask, dtype=dtype, seq_len=700, head_dim=64, v_head_dim=64) for mask in asked]
    assert_exact(gpu_world, {"ring": torch.cuda.device_count()}, low, bound)
