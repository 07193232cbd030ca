import re
from collections.abc import Callable

import pytest
import torch
from conftest import World
from ranks import groups, raised, sequence
from torch import Tensor

from ring_sp import ShardedSequence, masks, ring_attention


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

    def same(x: Tensor, seq_len: int = 16) -> str:
        return call(x, x, x, seq_len)

    x = make(1, 8, 4, 8)
    other = torch.distributed.get_rank() == 1
    seq = ShardedSequence(17, groups(ring=2).topology)
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
        "whole sequence": r"q must hold this rank's 8 tokens.*sequence.shard.*\(1, 16, 4, 8\)",
        "keys": "kv_sequence",
        "uneven": "9 tokens",
        "sinks": r"sinks must be \[4\]",
        "kernel": "reference; got 'fast'",
        "ulysses": "2 divides; got 3",
        "empty": "none of them 0",
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
