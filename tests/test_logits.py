from collections.abc import Callable
from itertools import cycle
from unittest import mock

import pytest
import torch
from conftest import World
from oracle import dense_mask
from ranks import groups, raised, sequence
from ringed import Case, inputs, relative
from torch import Tensor
from visibility import cases

import ring_sp
from ring_sp import ShardedSequence, layout, masks
from ring_sp.kernels import Step, reference, row_max


def wanted(case: Case, q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    """The largest visible score of each head over the queries at some positions, unsharded."""
    length = max(case.seq_len, k.shape[1])
    visible = dense_mask(cases(length)[case.mask][1], case.seq_len, k.shape[1])
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k)
    scores = scores * (case.head_dim**-0.5 if case.scale is None else case.scale)
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    return scores.masked_fill(~visible, -torch.inf)[:, :, positions].amax((0, 2, 3))


def errors(sizes: dict[str, int], checked: list[Case]) -> list[tuple[float, str]]:
    """How far this rank's largest scores are from the oracle's; worst first."""
    manager, found = groups(**sizes), []
    for case in checked:
        (q, k, *_), _ = inputs(case, 3)
        mask = cases(max(case.seq_len, k.shape[1]))[case.mask][0]
        queries = ShardedSequence(case.seq_len, manager.topology, mask, case.layout)
        keys = ShardedSequence(k.shape[1], manager.topology, layout=case.layout)
        keys = queries if case.kv_len is None else keys
        own = queries.shard(q).requires_grad_(), keys.shard(k).requires_grad_()
        mine = ring_sp.max_logits(*own, queries, keys, case.scale, case.softcap)
        assert not mine.requires_grad and mine.dtype == case.accumulation
        true = wanted(case, q.detach().double(), k.detach().double(), queries.positions())
        found.append((relative(mine.double(), true), str(case)))
    return sorted(found, reverse=True)


def checked(heads: tuple[int, int]) -> list[Case]:
    """Every mask over two layouts, some of whose ranks see nothing; cross attention; options."""
    lengths, names = cycle([29, 24, 37, 8, 31]), cycle(layout.LAYOUTS)
    return [
        *(Case(m, next(names), next(lengths), heads=heads) for m in cases(24) for _ in range(2)),
        *(Case(m, next(names), 31, kv, heads) for m in ("full", "window") for kv in (17, 47)),
        *(Case(scale=scale, heads=heads) for scale in (0.7, -0.7, 0.0)),
        Case(softcap=1.5, heads=heads),
        Case("documents", softcap=1.5, heads=heads),
        Case(dtype=torch.bfloat16, heads=heads),
    ]


@pytest.mark.parametrize(
    ("size", "sizes", "heads"),
    [
        (1, {}, (4, 2)),
        (2, {"ring": 2}, (4, 4)),
        (2, {"ulysses": 2}, (4, 1)),
        (3, {"ring": 3}, (4, 1)),
        (4, {"ring": 4}, (4, 2)),
        (4, {"outer": 2, "ring": 2}, (4, 2)),
        (4, {"ring": 2, "ulysses": 2}, (6, 3)),
    ],
    ids=str,
)
def test_equals_the_largest_of_all_scores(
    world: Callable[[int], World], size: int, sizes: dict[str, int], heads: tuple[int, int]
) -> None:
    for found in world(size).run(errors, sizes, checked(heads)):
        # Products in float32, of what bfloat16 holds.
        assert max(e for e, case in found if "bfloat16" not in case) < 1e-12, found[0]
        assert found[0][0] < 1e-6, found[0]


def blind(_: object = None) -> list[list[float]]:
    """A ring whose second half belongs to no document."""
    place = sequence({"ring": 2}, 16, mask=masks.documents([0, 8]), layout="contiguous")
    x = torch.ones(1, 8, 2, 4)
    return [ring_sp.max_logits(x, x, place, softcap=cap).tolist() for cap in (None, 1.0)]


def test_a_rank_that_sees_nothing_has_none(world: Callable[[int], World]) -> None:
    capped = torch.tensor(2.0).tanh().item()
    assert world(2).run(blind) == [[[2.0] * 2, [capped] * 2], [[-torch.inf] * 2] * 2]


def test_columns_are_cut_where_there_are_many() -> None:
    case = Case("two_sided", "contiguous", 61)
    (q, k, *_), _ = inputs(case, 3)
    mask, sees = cases(61)["two_sided"]
    found = torch.full((2, 4, 61), -torch.inf, dtype=torch.float64)
    step = Step(ShardedSequence(61, mask=mask, layout="contiguous").plan().tiles(0), 1.0)
    with mock.patch.object(row_max, "BLOCK_COLS", 7), mock.patch.object(reference, "BLOCK_ROWS", 9):
        row_max.fold(q.detach(), k.detach(), step, found)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, 2))
    true = scores.masked_fill(~dense_mask(sees, 61, 61), -torch.inf).amax(-1)
    assert relative(found, true) < 1e-12


def refusals(_: object = None) -> list[str]:
    place = sequence({"ring": 2}, 16)
    rank = place.topology.rank
    x, short = torch.ones(1, 8, 4, 4), torch.ones(1, 7, 4, 4)
    return [
        raised(ring_sp.max_logits, short if rank else x, x, place),
        raised(ring_sp.max_logits, x, torch.ones(1, 8, 3, 4), place),
        raised(ring_sp.max_logits, x, x.double(), place),
        raised(ring_sp.max_logits, x, x[0], place),
        raised(ring_sp.max_logits, x, x, place, softcap=-1.0 - rank),
        raised(ring_sp.max_logits, x, x, place, scale=1.0 + rank),
        raised(ring_sp.max_logits, x, x, "place"),
    ]


def test_raises_on_all_ranks_what_is_wrong_on_one(world: Callable[[int], World]) -> None:
    needed = [
        "q must hold this rank's 8 tokens",
        "3 does not divide 4",
        "q and k must share one floating-point dtype",
        "k must be [batch, tokens, heads, head dim]",
        "softcap must be None or a finite number above 0",
        "all ranks of a sequence-parallel group must make the same call",
        "sequence must be a ShardedSequence",
    ]
    for messages in world(2).run(refusals):
        for message, need in zip(messages, needed, strict=True):
            assert need in message


def test_the_compiler_takes_it_whole() -> None:
    place = ShardedSequence(8)
    x = torch.randn(1, 8, 2, 4)
    compiled = torch.compile(
        lambda q: ring_sp.max_logits(q, q, place) * 2, fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(x), 2 * ring_sp.max_logits(x, x, place))
