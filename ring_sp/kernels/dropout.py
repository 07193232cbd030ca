"""Which weights of attention are dropped: a function of a seed, the batch entry, the head, and the
positions of query and key.

So it is the same in forward and backward, in a recomputation, on any layout and any number of
ranks. The numbers are those of Philox4x32-10 (Salmon et al., SC 2011), `triton.language.philox`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LOW = 0xFFFFFFFF
KEYS = 0x9E3779B9, 0xBB67AE85
FACTORS = 0xD2511F53, 0xCD9E8D57
ROUNDS = 10


@dataclass(frozen=True)
class Dropout:
    """What a kernel drops in a step: a weight with probability `p`; the others are divided by
    1 - p.

    Positions are int32 [Sq] and [Sk], of the queries and keys at hand. The kernel's first head is
    `first_head` of `num_heads` (Ulysses gives a rank some of them).
    """

    p: float
    seed: int
    q_positions: Tensor
    k_positions: Tensor
    first_head: int
    num_heads: int

    @property
    def threshold(self) -> int:
        """A weight is kept where the upper 31 bits of its number are no less."""
        return round(self.p * (1 << 31))

    def kept(self, batch: int, heads: int, rows: slice, cols: slice, dtype: torch.dtype) -> Tensor:
        """0 or 1 / (1 - p) for weights of those rows and columns, [batch, heads, rows, cols]."""
        q, k = self.q_positions[rows].long(), self.k_positions[cols].long()
        entry, head = (torch.arange(n, device=q.device) for n in (batch, heads))
        lines = entry[:, None] * self.num_heads + self.first_head + head
        numbers = philox(self.seed, q[:, None], k, lines[:, :, None, None])
        return (numbers >> 1 >= self.threshold).to(dtype) / (1 - self.p)


def philox(seed: int, first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    """The first of the four numbers of 32 bits for counters (first, second, third, 0), int64."""
    counters = *torch.broadcast_tensors(first, second, third), torch.zeros_like(third)
    key = seed & LOW, seed >> 32 & LOW
    for _ in range(ROUNDS):
        a, b = counters[0] * FACTORS[0], counters[2] * FACTORS[1]
        counters = (
            (b >> 32 & LOW) ^ counters[1] ^ key[0],
            b & LOW,
            (a >> 32 & LOW) ^ counters[3] ^ key[1],
            a & LOW,
        )
        key = (key[0] + KEYS[0]) & LOW, (key[1] + KEYS[1]) & LOW
    return counters[0]
