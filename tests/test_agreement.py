import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import World
from ranks import groups, raised, sequence
from torch import Tensor

from ring_sp import ProcessGroupManager, ShardedSequence, agreement, masks, ring_attention
from ring_sp.topology import Topology


def bad_calls() -> dict[str, str]:
    """The messages of calls that are wrong on every rank, and of some that only rank 1 gets
    wrong.
    """

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(*shape, dtype=dtype)

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        seq_len: int = 16,
        sizes: dict[str, int] | None = None,
        mask: masks.Mask | None = None,
        **options: object,
    ) -> str:
        seq = sequence(sizes or {"ring": 2}, seq_len, mask=mask)
        return raised(ring_attention, q, k, v, seq, **options)

    def same(x: Tensor, seq_len: int = 16, **options: Any) -> str:
        return call(x, x, x, seq_len, **options)

    def over(sequence: object, **options: object) -> str:
        return raised(ring_attention, x, x, x, sequence, **options)

    x = make(1, 8, 4, 8)
    other = torch.distributed.get_rank() == 1
    seq = ShardedSequence(17, groups(ring=2).topology)
    even = ShardedSequence(16, groups(ring=2).topology)
    prefix = ShardedSequence(16, groups(ring=2).topology, masks.prefix_lm(3))
    return {
        "3 dimensions": call(x[0], x, x),
        "dtypes": call(x, x.double(), x),
        "integers": call(x.long(), x.long(), x.long()),
        "heads": call(x, make(1, 8, 3, 8), make(1, 8, 3, 8)),
        "kv heads": call(x, make(1, 8, 2, 8), x),
        "head dims": call(x, make(1, 8, 4, 6), x),
        "batches": call(x, make(2, 8, 4, 8), make(2, 8, 4, 8)),
        "whole sequence": call(make(1, 16, 4, 8), x, x),
        "keys": call(x, make(1, 9, 4, 8), make(1, 9, 4, 8)),
        "uneven": raised(ring_attention, x, x, x, seq),
        "sinks": call(x, x, x, sinks=torch.zeros(3)),
        "kernel": call(x, x, x, kernel="fast"),
        "ulysses": call(make(1, 8, 3, 8), make(1, 8, 3, 8), make(1, 8, 3, 8), sizes={"ulysses": 2}),
        "empty": call(make(0, 8, 4, 8), make(0, 8, 4, 8), make(0, 8, 4, 8)),
        "no tensor": raised(ring_attention, None, x, x, even),
        "no sequence": over(groups(ring=2)),
        "no kv_sequence": over(even, kv_sequence=16),
        "kv mask": over(even, kv_sequence=prefix),
        "sinks list": same(x, sinks=[0.0] * 4),
        "softcap": same(x, softcap=0),
        "scale": same(x, scale=float("nan")),
        "dropout": same(x, dropout_p=0.1),
        "no dropout_p": same(x, dropout_p=None),
        "rank 1 seed": same(x, dropout_p=0.1, dropout_seed=int(other)),
        "kernel list": same(x, kernel=["reference"]),
        "no part": raised(even.unshard, None),
        "rank 1 dropout": same(x, dropout_p=0.1 * other),
        "rank 1 lse": same(x, return_lse=other),
        "rank 1 sinks": same(x, sinks=torch.zeros(4) if other else None),
        "rank 1 gradients": same(make(1, 8, 4, 8).requires_grad_() if other else x),
        "rank 1 part": raised(even.unshard, make(1, 8 + other)),
        "rank 1 part dtype": raised(even.unshard, x.double() if other else x),
        "rank 1 dtype": same(x.double() if other else x),
        "rank 1 heads": call(x, x if not other else x[:, :, :3], x if not other else x[:, :, :3]),
        "rank 1 mask": call(x, x, x, mask=masks.documents([0, 8 + other])),
        "rank 1 length": same(make(1, 9, 4, 8) if other else x, seq_len=18 if other else 16),
        "steps": raised(
            ring_attention,
            x,
            x,
            x,
            sequence({"ring": 2}, 16, layout="striped"),
            sequence({"ring": 2}, 16, layout="zigzag"),
        ),
    }


@pytest.mark.parametrize(
    ("name", "message"),
    {
        "3 dimensions": r"q must be \[batch, tokens, heads, head dim\]",
        "dtypes": "one floating-point dtype.*float64",
        "integers": "one floating-point dtype",
        "heads": "3 does not divide 4",
        "kv heads": "k and v must have the same tokens and heads",
        "head dims": "one head dimension",
        "batches": "one batch size",
        "whole sequence": r"q must hold this rank's 8 tokens.*\(1, 16, 4, 8\).*sequence.shard",
        "keys": "kv_sequence",
        "uneven": "9 tokens",
        "sinks": r"sinks must be a tensor \[4\].*got \[3\]",
        "kernel": "reference; got 'fast'",
        "ulysses": "2 divides; got 3",
        "empty": "none of them 0",
        "no tensor": "q must be.*NoneType",
        "no sequence": "sequence must be a ShardedSequence.*ProcessGroupManager",
        "no kv_sequence": "kv_sequence must be a ShardedSequence.*int",
        "kv mask": r"the mask causal\(\).*prefix_lm\(3\)",
        "sinks list": r"sinks must be a tensor \[4\]",
        "softcap": "above 0; got 0",
        "scale": "finite number; got nan",
        "dropout": "dropout_p=0.1",
        "no dropout_p": "dropout_p=None",
        "rank 1 seed": "same call.*dropout_seed=1",
        "kernel list": "kernel must be one of",
        "no part": "must be a tensor; got.*NoneType",
        "rank 1 dropout": "dropout_p=0.1",
        "rank 1 lse": "same call.*return_lse=True",
        "rank 1 sinks": "same call.*sinks NoneType",
        "rank 1 gradients": "same call.*gradients True",
        "rank 1 part": "8 tokens along dimension 1",
        "rank 1 part dtype": "same call.*float64",
        "rank 1 dtype": "same call.*float32.*float64",
        "rank 1 heads": "3 does not divide 4",
        "rank 1 mask": "same call.*checksum",
        "rank 1 length": "same call.*18 tokens",
        "steps": "the same layout",
    }.items(),
)
def test_bad_input_is_refused_on_every_rank(
    world: Callable[[int], World], name: str, message: str
) -> None:

    for answers in refusals(world):
        assert re.search(message, answers[name], re.DOTALL), answers[name] or "no error"


_answers: list[dict[str, str]] = []


def refusals(world: Callable[[int], World]) -> list[dict[str, str]]:
    if not _answers:
        _answers.extend(world(2).run(bad_calls))
    return _answers


def mistakes_after_a_good_call() -> list[str]:
    """What both ranks are told when rank 1 gets the first call of another kind wrong."""
    sequence, x = ShardedSequence(22, groups(ring=2).topology), torch.zeros(1, 11, 4, 8)
    ring_attention(x, x, x, sequence)
    wrong = x[:, : 11 - dist.get_rank()]
    with_lse = raised(ring_attention, wrong, x, x, sequence, return_lse=True)
    return [with_lse, raised(sequence.unshard, wrong), raised(sequence.unshard, wrong, 2)]


def test_the_first_call_of_another_kind_is_refused_on_every_rank(
    world: Callable[[int], World],
) -> None:
    for with_lse, part, other in world(2).run(mistakes_after_a_good_call):
        assert "11 tokens" in with_lse and "11 tokens" in part and "11 tokens" in other


def calls_beyond_what_is_remembered() -> float:
    """Rank 1 makes its sequence again when the agreement on it is long forgotten."""
    topology, x = ProcessGroupManager.build(ring=2).topology, torch.ones(1, 16, 2, 8)
    kept = ShardedSequence(32, topology)
    ring_attention(x, x, x, kept)
    with mock.patch.object(agreement, "KEPT_AGREEMENTS", 6):
        for cut in range(1, 12):
            mask = masks.documents([0, cut, 32])
            ring_attention(x, x, x, ShardedSequence(32, topology, mask))
        again = ShardedSequence(32, topology) if dist.get_rank() else kept
        return float(ring_attention(x, x, x, again).mean())


def test_forgotten_agreements_are_made_again_by_all_ranks(world: Callable[[int], World]) -> None:
    assert world(2).run(calls_beyond_what_is_remembered) == [1.0, 1.0]


def later_calls() -> list[str]:
    """What a rank alone may do once all have agreed, and what is raised where it is seen."""
    rank, topology = torch.distributed.get_rank(), groups(ring=2).topology
    sequence, x = ShardedSequence(16, topology), torch.zeros(1, 8, 4, 8)
    ring_attention(x, x, x, sequence)
    again = ShardedSequence(16, topology) if rank else sequence
    ring_attention(x, x, x, again)
    again.unshard(x)
    (sequence if rank else ShardedSequence(16, topology)).unshard(x)
    return [
        raised(ring_attention, x[:, :7], x, x, again),
        raised(again.unshard, x[:, :7]),
        *(raised(ring_attention, x, x, x, ShardedSequence(16, topology)) for _ in range(3)),
    ]


def test_a_rank_alone_may_make_its_sequence_again(world: Callable[[int], World]) -> None:
    for short, part, *equal in world(2).run(later_calls):
        assert "8 tokens" in short and "8 tokens" in part and equal == [""] * 3


def test_what_a_topology_remembers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    topology = Topology()
    monkeypatch.setattr(agreement, "KEPT_AGREEMENTS", 8)
    for number in range(20):
        agreement.agree(topology, f"subject {number // 4}", f"terms {number}", None, "cpu")
    assert len(topology.agreements) == 8 and "terms 19" in topology.agreements
