"""Which global positions each rank of a sequence-parallel group holds. No torch here.

A shard is a tuple of `range`s (spans) of global positions, in the order in which the rank stores
them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, count, pairwise, takewhile
from operator import index

Shard = tuple[range, ...]
Work = Callable[[range], int]
"""The work of the queries at some positions, in visible pairs."""

EVEN_ENOUGH = 0.98
"""Share of an even spread of work with which `balanced` is content."""


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


def balanced(seq_len: int, size: int, work: Work = len) -> tuple[Shard, ...]:
    """Every rank holds 1, 2, 4, ... or 64 chunks, whichever first spreads the work evenly (or the
    best of them), so that packed documents weigh the same on all ranks.

    The heaviest chunk goes to the rank with the least work so far. For long sequences that is
    zigzag under a causal mask, and contiguous under a full one.
    """
    best, best_share = contiguous(seq_len, size), 0.0
    for chunks in takewhile(lambda n: n <= min(64, seq_len // size), (1 << n for n in count())):
        owners, share = _owners([work(x) for x in _stretches(_even(seq_len, size * chunks))], size)
        if share > best_share:
            best, best_share = (
                _held(owners, [_even(n, chunks) for n in _even(seq_len, size)]),
                share,
            )
        if share >= EVEN_ENOUGH:
            break
    return best


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


LAYOUTS: dict[str, Callable[..., tuple[Shard, ...]]] = {
    "contiguous": contiguous,
    "striped": striped,
    "zigzag": zigzag,
    "balanced": balanced,
}


def shards(
    seq_len: int, size: int, layout: str | ZigzagDocuments, work: Work = len
) -> tuple[Shard, ...]:
    """The shard of each of `size` ranks of a sequence of `seq_len` tokens; only "balanced" asks for
    `work`.

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
    of_work = (work,) if layout == "balanced" else ()
    return LAYOUTS[layout](seq_len, size, *of_work)


def whole_number(name: str, value: int) -> int:
    """`value` as an int. Raises ValueError for what is none, 2.0 and "2" among them."""
    try:
        return index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number; got {value!r}") from None


def shard_len(shard: Shard) -> int:
    """Number of tokens in a shard."""
    return sum(map(len, shard))


def joined(shard: Shard) -> Shard:
    """The same positions, with spans of step 1 that follow each other as one."""
    found: list[range] = []
    for span in shard:
        follows = found and found[-1].stop == span.start and found[-1].step == span.step == 1
        found.append(range(found.pop().start, span.stop) if follows else span)
    return tuple(found)


def part(shard: Shard, start: int, stop: int) -> Shard:
    """The positions at the slots `start` to `stop` - 1 of a shard."""
    offsets = accumulate(map(len, shard), initial=0)
    cuts = (
        span[max(start - at, 0) : max(stop - at, 0)]
        for span, at in zip(shard, offsets, strict=False)
    )
    return tuple(span for span in cuts if span)


def split(shard: Shard, parts: int) -> tuple[Shard, ...]:
    """Cut a shard into `parts` consecutive pieces of its own storage order (for Ulysses peers)."""
    stretches = _stretches(_even(shard_len(shard), parts))
    return tuple(part(shard, stretch.start, stretch.stop) for stretch in stretches)


def _even(total: int, parts: int) -> list[int]:
    return [total // parts + (part < total % parts) for part in range(parts)]


def _stretches(lens: Sequence[int]) -> list[range]:
    return [range(start, stop) for start, stop in pairwise(accumulate(lens, initial=0))]


def _owners(works: Sequence[int], size: int) -> tuple[list[int], float]:
    """A rank for each chunk, as many for each, and the mean work of a rank by the most of one."""
    loads, counts, owners = [0] * size, [0] * size, [0] * len(works)
    for chunk in sorted(range(len(works)), key=lambda chunk: -works[chunk]):
        free = (rank for rank in range(size) if counts[rank] < len(works) // size)
        rank = owners[chunk] = min(free, key=lambda rank: loads[rank])
        loads[rank] += works[chunk]
        counts[rank] += 1
    return owners, sum(loads) / size / max(1, *loads)


def _held(owners: Sequence[int], lens: Sequence[Sequence[int]]) -> tuple[Shard, ...]:
    """The shard of each rank, which owns chunks of `lens` tokens in this order."""
    left, stop = list(map(iter, lens)), 0
    held: list[list[range]] = [[] for _ in lens]
    for owner in owners:
        start, stop = stop, stop + next(left[owner])
        held[owner].append(range(start, stop))
    return tuple(joined(tuple(shard)) for shard in held)
