"""Which global positions each rank of a sequence-parallel group holds. No torch here.

A shard is a tuple of `range`s (spans) of global positions, in the order in which the rank stores
them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import index

Shard = tuple[range, ...]
Layout = Callable[[int, int], tuple[Shard, ...]]


def contiguous(seq_len: int, size: int) -> tuple[Shard, ...]:
    """Rank r holds the r-th of `size` consecutive stretches; lengths differ by at most one
    token.
    """
    return tuple((span,) for span in _stretches(_even(seq_len, size)))


def striped(seq_len: int, size: int) -> tuple[Shard, ...]:
    """Rank r holds positions r, r + size, r + 2 size, ... (arXiv:2311.09431, section 3)."""
    return tuple((range(rank, seq_len, size),) for rank in range(size))


def zigzag(seq_len: int, size: int) -> tuple[Shard, ...]:
    """Rank r holds the r-th chunk from the front and the r-th from the back, of 2 size chunks.

    Under a causal mask every pair of distinct ranks then has equal work. Where 2 size divides
    `seq_len` these are the shards of Megatron's context parallelism; elsewhere chunk lengths, and
    the lengths of the ranks, differ by at most one token.
    """
    lens = _even(seq_len, size)
    front = [(length + 1) // 2 for length in lens]
    back = [length // 2 for length in reversed(lens)]
    spans = _stretches(front + back)
    pairs = ((spans[rank], spans[2 * size - 1 - rank]) for rank in range(size))
    return tuple(tuple(span for span in pair if span) for pair in pairs)


LAYOUTS: dict[str, Layout] = {"contiguous": contiguous, "striped": striped, "zigzag": zigzag}


@dataclass(frozen=True)
class ZigzagDocuments:
    """Every packed document in zigzag by itself: a rank holds its two chunks of the first document,
    then those of the second, and so on.

    Document d is at positions cu_seqlens[d] to cu_seqlens[d + 1] - 1, its padding included. These
    are the shards of Megatron's and Transformer Engine's context parallelism for packed sequences.
    Under a causal mask in each document all ranks have equal work.
    """

    cu_seqlens: tuple[int, ...]

    def __call__(self, seq_len: int, size: int) -> tuple[Shard, ...]:
        """Raises ValueError unless the documents fill the sequence and 2 size divides each."""
        cuts, unit = self.cu_seqlens, 2 * size
        if not cuts or cuts[0] != 0 or cuts[-1] != seq_len:
            raise ValueError(
                f"zigzag in each document needs cu_seqlens from 0 to the sequence's {seq_len} "
                f"tokens; got {cuts[:1]} to {cuts[-1:]}"
            )
        spans: list[list[range]] = [[] for _ in range(size)]
        for start, stop in pairwise(cuts):
            chunk, rest = divmod(stop - start, unit)
            if chunk < 0 or rest:
                raise ValueError(
                    f"zigzag in each document over {size} ranks needs documents of a multiple of "
                    f"{unit} tokens; got {stop - start} at {start}. Pad them, or choose the layout "
                    f"of the whole sequence."
                )
            for rank in range(size if chunk else 0):
                for part in (rank, unit - 1 - rank):
                    spans[rank].append(range(start + part * chunk, start + (part + 1) * chunk))
        return tuple(map(tuple, spans))

    def __str__(self) -> str:
        return f"zigzag in each of {len(self.cu_seqlens) - 1} documents"


def shards(seq_len: int, size: int, layout: str | ZigzagDocuments) -> tuple[Shard, ...]:
    """The shard of each of `size` ranks of a sequence of `seq_len` tokens.

    Raises ValueError for an unknown layout, a size below 1, or fewer tokens than ranks.
    """
    if isinstance(layout, ZigzagDocuments):
        return layout(seq_len, size)
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")
    if size < 1:
        raise ValueError(f"the number of ranks must be at least 1; got {size}")
    if seq_len < size:
        raise ValueError(
            f"a sequence over {size} ranks needs at least {size} tokens; got {seq_len}. "
            f"Use a longer sequence or fewer sequence-parallel ranks."
        )
    return LAYOUTS[layout](seq_len, size)


def whole_number(name: str, value: int) -> int:
    """`value` as an int. Raises ValueError for what is none, 2.0 and "2" among them."""
    try:
        return index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number; got {value!r}") from None


def shard_len(shard: Shard) -> int:
    """Number of tokens in a shard."""
    return sum(map(len, shard))


def split(shard: Shard, parts: int) -> tuple[Shard, ...]:
    """Cut a shard into `parts` consecutive pieces of its own storage order (for Ulysses peers)."""
    stretches = _stretches(_even(shard_len(shard), parts))
    return tuple(_take(shard, stretch.start, stretch.stop) for stretch in stretches)


def _even(total: int, parts: int) -> list[int]:
    return [total // parts + (part < total % parts) for part in range(parts)]


def _stretches(lens: Sequence[int]) -> list[range]:
    return [range(start, stop) for start, stop in pairwise(accumulate(lens, initial=0))]


def _take(shard: Shard, start: int, stop: int) -> Shard:
    """The slots `start` to `stop` of a shard."""
    offsets = accumulate(map(len, shard), initial=0)
    cuts = (
        span[max(start - at, 0) : max(stop - at, 0)]
        for span, at in zip(shard, offsets, strict=False)
    )
    return tuple(span for span in cuts if span)
