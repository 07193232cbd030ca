"""Megatron's offloading of what the attention saves, as its hooks do it, without a GPU."""

from collections.abc import Callable
from types import TracebackType
from typing import Any
from weakref import ref

import pytest
import torch
from conftest import World

pytest.importorskip("megatron")
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron_gpt import case, config, start
from torch import Tensor

from ring_sp.integrations.megatron import MegatronRing, RingCoreAttention

SEQ_LEN, HEADS, DIM, V_DIM = 32, 4, 8, 12


class Offload:
    """Takes what is saved, moves it away at `commit`, and forces storages free, as
    `ChunkOffloadHandler.bulk_offload` does.
    """

    def __init__(self) -> None:
        self.held: list[Tensor] = []
        self.gone: list[ref[Tensor]] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def __enter__(self) -> "Offload":
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    def _pack(self, x: Tensor) -> int | Tensor:
        if isinstance(x, torch.nn.Parameter):
            return x
        self.held.append(x)
        return len(self.held) - 1

    def _unpack(self, tag: int | Tensor) -> Tensor:
        return tag if isinstance(tag, Tensor) else self.held[tag].clone()

    def commit(self, released: list[Tensor]) -> None:
        self.gone = [ref(x) for x in self.held]
        self.held = [x.contiguous().clone() for x in self.held]
        for x in released:
            x.untyped_storage().resize_(0)


def compared(options: dict[str, Any]) -> list[bool]:
    """Whether out and the gradients have the same bits with and without offloading, and whether of
    what was saved only out, which the layer goes on with, is still on the device.
    """
    given = case(ring=options["ring"], ulysses=options.get("ulysses", 1), config=options["config"])
    start(given)
    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
    ring = MegatronRing.from_options(given.options, groups.cp)
    ring.has_positions = True
    core = RingCoreAttention(
        config(given), 1, AttnMaskType.causal, "self", pg_collection=groups, ring=ring
    ).double()
    make = torch.Generator().manual_seed(1 + groups.cp.rank())
    rows = SEQ_LEN // given.ring
    shapes = (rows, 2, HEADS, DIM), (rows, 2, 2, DIM), (rows, 2, 2, V_DIM)
    whole = [
        torch.randn(*s, generator=make, dtype=torch.float64, requires_grad=True) for s in shapes
    ]
    cotangent = torch.randn(rows, 2, HEADS * V_DIM, generator=make, dtype=torch.float64)
    results = []
    for moved in (False, True):
        # What the layer hands over is its own, and freed with it.
        q, k, v = (x * 1 for x in whole)
        get_cuda_rng_tracker().reset()
        with Offload() as offload:
            out = core(q, k, v, None)
        if moved:
            offload.commit([q, k, v])
            alive = [x() for x in offload.gone]
        kept = out.detach().clone()
        sinks = [core.softmax_offset] if core.softmax_offset is not None else []
        results.append([kept, *torch.autograd.grad(out, [*whole, *sinks], cotangent)])
    sizes = [x.numel() for x in alive if x is not None and x.untyped_storage().size()]
    return [*map(torch.equal, *results), sum(sizes) <= kept.numel()]


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, {"ring": 2, "config": {}}),
        (2, {"ring": 2, "ulysses": 2, "config": {}}),
        (2, {"ring": 2, "config": {"softmax_type": "learnable", "attention_dropout": 0.3}}),
        (2, {"ring": 2, "config": {"qk_clip": True, "window_size": (9, 0)}}),
    ],
    ids=str,
)
def test_what_the_attention_saves_can_be_moved_away_and_back(
    world: Callable[[int], World], size: int, options: dict[str, Any]
) -> None:
    for same in world(size).run(compared, options):
        assert all(same), same
