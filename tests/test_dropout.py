"""Which weights are dropped."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from conftest import World
from ranks import groups, raised
from ringed import Case, assert_exact

from ring_sp import ProcessGroupManager, ShardedSequence, Topology, layout, ring_attention
from ring_sp.kernels.dropout import Dropout, philox

HEADS = 6


def dropout(p: float, seed: int = 5, first: int = 0, at: range = range(40)) -> Dropout:
    places = torch.tensor(at, dtype=torch.int32)
    return Dropout(p, seed, places, places, first, HEADS)


def kept(drops: Dropout, heads: int = HEADS) -> torch.Tensor:
    return drops.kept(2, heads, slice(None), slice(None), torch.float64)


def test_the_numbers_are_philoxs() -> None:
    """The known answer for counters and key of zero."""
    zero = torch.zeros((), dtype=torch.int64)
    assert philox(0, zero, zero, zero).item() == 0x6627E8D5


def test_a_weight_is_dropped_for_its_own_head_and_positions_wherever_they_are_seen() -> None:
    whole = kept(dropout(0.4))
    assert torch.equal(kept(dropout(0.4, first=2), 3), whole[:, 2:5])
    assert torch.equal(kept(dropout(0.4, at=range(1, 40, 3))), whole[:, :, 1::3, 1::3])
    rows, cols = slice(3, 9), slice(20, 31)
    assert torch.equal(dropout(0.4).kept(2, 6, rows, cols, torch.float64), whole[:, :, rows, cols])


def test_no_two_seeds_entries_heads_queries_or_keys_are_alike() -> None:
    masks = [kept(dropout(0.5, seed)) for seed in (0, 1, 1 << 32, (1 << 63) - 1)]
    lines = torch.stack(masks).flatten(0, 2)
    for each in (lines.flatten(1), lines.flatten(0, 1), lines.mT.flatten(0, 1)):
        assert len(each.unique(dim=0)) == len(each)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_a_share_of_p_is_dropped_and_the_mean_stays(p: float) -> None:
    found = kept(dropout(p, at=range(300)))
    share = (found == 0).double().mean().item()
    assert abs(share - p) < 5 * (p * (1 - p) / found.numel()) ** 0.5 + 1e-12
    assert found.max().item() == 1 / (1 - p)


@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        (1, {}),
        (4, {"ring": 4}),
        (4, {"ring": 2, "ulysses": 2}),
        (8, {"outer": 2, "ring": 2, "ulysses": 2}),
    ],
    ids=str,
)
def test_a_ring_drops_what_one_rank_would(
    world: Callable[[int], World], size: int, sizes: dict[str, int]
) -> None:
    """In both directions of the backward: with as many key heads as query heads queries travel."""
    case = Case(seq_len=31, dropout_p=0.3)
    cases = [
        replace(case, heads=heads, layout=name, sinks=name == "zigzag")
        for heads in ((4, 2), (4, 4))
        for name in layout.LAYOUTS
    ]
    cases += [
        replace(case, dropout_p=0.7, mask="documents", seq_len=24, softcap=1.5),
        replace(case, dropout_p=0.1, mask="full", kv_len=47),
    ]
    assert_exact(world(size), sizes, cases)


def later_calls() -> list[str]:
    """What goes wrong where seeds, sequences and topologies differ among ranks."""
    rank, topology = dist.get_rank(), groups(ring=2).topology
    kept = ShardedSequence(8, topology)

    def call(seq: ShardedSequence, seed: int | None) -> str:
        x = torch.zeros(1, seq.local_len, 2, 4)
        return raised(ring_attention, x, x, x, seq, dropout_p=0.1, dropout_seed=seed)

    fine = [call(kept, 1), call(ShardedSequence(8, topology) if rank else kept, 2)]
    missing = "" if rank else call(kept, None)
    kinds = None, torch.float32
    group = topology.group
    assert group is not None
    other = ProcessGroupManager.from_group(group, sums_dtype=kinds[rank]).topology
    return [*fine, missing, call(ShardedSequence(8, other), 3)]


def test_ranks_that_differ_are_told_or_need_not_be(world: Callable[[int], World]) -> None:
    for rank, (first, fresh, missing, sums) in enumerate(world(2).run(later_calls)):
        assert first == fresh == ""
        assert ("got None" in missing) == (rank == 0)
        assert "same call" in sums and "sums in torch.float32" in sums


def test_a_fresh_sequence_agrees_on_nothing_new() -> None:
    x, topology = torch.zeros(1, 8, 2, 4), Topology()
    for seed in range(5):
        ring_attention(x, x, x, ShardedSequence(8, topology), dropout_p=0.1, dropout_seed=seed)
        assert len(topology.agreements) == 3


def test_dropout_wants_a_probability_and_a_seed_in_every_call() -> None:
    x, seq = torch.zeros(1, 8, 2, 4), ShardedSequence(8)
    for p, seed, message in [
        (0.1, None, r"dropout_p=0\.1 needs an int from 0 to 2\*\*63 - 1.*got None"),
        (0.1, -1, "got -1"),
        (0.1, 1 << 63, "got 9223372036854775808"),
        (1.0, 1, r"0 <= dropout_p < 1; got dropout_p=1\.0"),
        (-0.1, 1, r"dropout_p=-0\.1"),
    ]:
        ring_attention(x, x, x, seq, dropout_p=0.1, dropout_seed=7)
        with pytest.raises(ValueError, match=message):
            ring_attention(x, x, x, seq, dropout_p=p, dropout_seed=seed)
    ring_attention(x, x, x, seq, dropout_seed=3)
