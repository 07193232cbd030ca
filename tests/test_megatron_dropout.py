from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import World

pytest.importorskip("megatron")
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker, get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron_gpt import case, config, start
from torch import Tensor

from ring_sp.integrations.megatron import MegatronRing, RingCoreAttention


def core(p: float, ring: int) -> RingCoreAttention:
    given = case(ring=ring, config={"attention_dropout": p})
    start(given)
    torch.manual_seed(5)
    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
    made = MegatronRing.from_options(given.options, groups.cp)
    return RingCoreAttention(
        config(given), 1, AttnMaskType.causal, "self", pg_collection=groups, ring=made
    )


def inputs(rank: int = 0) -> list[Tensor]:
    make = torch.Generator().manual_seed(2 + rank)
    return [
        torch.randn(16, 1, 4, 8, generator=make, dtype=torch.float64).requires_grad_()
        for _ in range(3)
    ]


def dropped(p: float) -> list[bool]:
    """What is true of a core's dropout in training, on one rank."""
    attend, given = core(p, 1), inputs()
    first, following = attend(*given, None), attend(*given, None)
    again = core(p, 1)(*given, None)
    other_heads = core(p, 1)
    with mock.patch.object(other_heads, "tp_group", SimpleNamespace(rank=lambda: 1)):
        other = other_heads(*given, None)
    attend.eval()
    plain = attend(*given, None)
    alike = [torch.equal(first, x) for x in (again, following, other, plain)]
    return [*alike, torch.equal(plain, attend(*given, None))]


def test_dropout_is_drawn_anew_for_each_call_and_tensor_rank_and_only_in_training(
    world: Callable[[int], World],
) -> None:
    assert world(1).run(dropped, 0.3) == [[True, False, False, False, True]]
    assert world(1).run(dropped, 0.0) == [[True] * 5]


def strayed(draws: int) -> list[Tensor]:
    """What two calls give where the second rank draws numbers of its own between them."""
    attend = core(0.3, 2)
    rank = torch.distributed.get_rank()
    results = []
    for _ in range(2):
        results.append(attend(*inputs(rank), None).detach())
        torch.rand(draws * rank)
        if draws:
            torch.manual_seed(99 + rank)
    return results


def test_what_a_rank_draws_besides_changes_nothing(world: Callable[[int], World]) -> None:
    for calm, busy in zip(*(world(2).run(strayed, draws) for draws in (0, 3)), strict=True):
        assert all(map(torch.equal, calm, busy))


def recomputed(checkpointed: bool) -> list[Tensor]:
    """Gradients of two micro-batches in flight, with Megatron's recomputation or without it."""
    attend, tracker = core(0.3, 2), get_cuda_rng_tracker()
    batches = [inputs(2 * n + torch.distributed.get_rank()) for n in range(2)]
    # The tracker of machines without a GPU forgets what it is given.
    really = partial(CudaRNGStatesTracker.set_states, tracker)
    with mock.patch.object(tracker, "set_states", really):
        outs = [
            tensor_parallel.checkpoint(lambda *x: attend(*x, None), False, *batch)
            if checkpointed
            else attend(*batch, None)
            for batch in batches
        ]
        for out in outs:
            out.backward(torch.ones_like(out).cumsum(0))
        later = attend(*batches[0], None).detach()
    return [later, *(x.grad for batch in batches for x in batch if x.grad is not None)]


def test_recomputation_drops_what_its_forward_dropped(world: Callable[[int], World]) -> None:
    for found, true in zip(*(world(2).run(recomputed, c) for c in (True, False)), strict=True):
        assert len(found) == len(true) == 7
        assert all(map(torch.equal, found, true))


def resumed() -> bool:
    """Whether a run goes on as it would have, from what a checkpoint has of the tracker."""
    attend, given = core(0.3, 1), inputs()
    attend(*given, None)
    saved = get_cuda_rng_tracker().get_states()
    on = attend(*given, None)
    fresh = core(0.3, 1)
    CudaRNGStatesTracker.set_states(get_cuda_rng_tracker(), saved)
    return torch.equal(on, fresh(*given, None))


def test_a_resumed_run_goes_on_counting(world: Callable[[int], World]) -> None:
    assert world(1).run(resumed) == [True]
