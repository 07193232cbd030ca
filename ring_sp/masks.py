"""Attention masks as a few regions, and the tiles in which two shards meet under them. No torch
here.

Every mask is a disjoint union of regions (regions.py); a new mask is a function that lists them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from ring_sp.layout import Shard, whole_number
from ring_sp.regions import UNBOUNDED, Region, Regions, Tile, union


@dataclass(frozen=True)
class Mask:
    """A rule for who sees whom; made by the functions of this module, compared by name and
    arguments.

    `min_len` is the number of positions the rule speaks of: no sequence may be shorter.
    `build(seq_len)` gives the disjoint regions for a sequence of `seq_len` tokens.
    """

    name: str
    args: tuple[object, ...]
    min_len: int = field(compare=False)
    build: Callable[[int], list[Region]] = field(compare=False, repr=False)

    def regions(self, seq_len: int) -> Regions:
        """The mask over `seq_len` tokens. Raises ValueError if it speaks of more positions than
        that.
        """
        if self.min_len > seq_len:
            raise ValueError(
                f"the mask {self} speaks of {self.min_len} positions, the sequence has {seq_len}. "
                f"Make the mask for this sequence, or pad the sequence."
            )
        return Regions(self.build(seq_len))

    def __reduce__(self) -> tuple[Callable[..., "Mask"], tuple[object, ...]]:
        return globals()[self.name], self.args

    def __str__(self) -> str:
        text = ", ".join(map(str, self.args))
        return f"{self.name}({text if len(text) < 80 else text[:76] + ' ...'})"


def full() -> Mask:
    """Every query sees every key."""
    return Mask("full", (), 0, lambda _: [Region()])


def causal() -> Mask:
    """A query sees its own position and all before it."""
    return Mask("causal", (), 0, lambda _: [Region(right=0)])


def sliding_window(left: int | None, right: int | None = 0) -> Mask:
    """A query sees `left` keys before its position, itself, and `right` after; None is no limit.

    A model whose window of w tokens includes the query itself has left = w - 1.
    Raises ValueError for a negative side.
    """
    left, right = (
        side if side is None else whole_number(f"the {name} side of sliding_window", side)
        for name, side in (("left", left), ("right", right))
    )
    sides = tuple(UNBOUNDED if side is None else side for side in (left, right))
    if min(sides) < 0:
        raise ValueError(
            f"sliding_window needs sides of 0 tokens or more, or None; got ({left}, {right})"
        )
    return Mask(
        "sliding_window", (left, right), 0, lambda _: [Region(left=sides[0], right=sides[1])]
    )


def chunked(size: int) -> Mask:
    """Causal attention inside consecutive chunks of `size` tokens. Raises ValueError for size <
    1.
    """
    size = whole_number("the chunk size", size)
    if size < 1:
        raise ValueError(f"chunked needs a chunk size of at least 1 token; got {size}")
    return Mask(
        "chunked",
        (size,),
        0,
        lambda seq_len: [
            Region(start, start + size, start, start + size, right=0)
            for start in range(0, seq_len, size)
        ],
    )


def prefix_lm(prefix_len: int) -> Mask:
    """Every query sees the first `prefix_len` keys; the rest is causal. Raises ValueError below
    0.
    """
    prefix_len = whole_number("prefix_len", prefix_len)
    if prefix_len < 0:
        raise ValueError(f"prefix_lm needs a prefix of 0 tokens or more; got {prefix_len}")
    prefix = [Region(k_stop=prefix_len)] if prefix_len else []
    return Mask("prefix_lm", (prefix_len,), prefix_len, lambda _: union([Region(right=0)], prefix))


def documents(
    cu_seqlens: Sequence[int], inner: Mask | None = None, lens: Sequence[int] | None = None
) -> Mask:
    """Packed documents: document d holds positions cu_seqlens[d] to cu_seqlens[d + 1] - 1 and sees
    only itself.

    `inner` (default causal) rules inside each document, in positions that start at its first token.
    `lens` are the tokens of each document, where it does not fill its place. Tokens after a
    document are padding: they see nothing and nobody sees them. Raises ValueError unless cu_seqlens
    starts at 0 and never falls, and each document fits its place.
    """
    cuts = tuple(whole_number("each of cu_seqlens", x) for x in _listed("cu_seqlens", cu_seqlens))
    if not cuts or cuts[0] != 0 or any(stop < start for start, stop in pairwise(cuts)):
        raise ValueError(
            f"documents needs cu_seqlens that start at 0 and never fall; got {cuts[:8]}"
        )
    rule, places = _inner(inner), list(pairwise(cuts))
    if lens is not None:
        held = tuple(whole_number("each of lens", x) for x in _listed("lens", lens))
        ends = [start + length for (start, _), length in zip(places, held, strict=False)]
        if len(held) != len(places) or any(
            not start <= end <= stop for (start, stop), end in zip(places, ends, strict=True)
        ):
            raise ValueError(
                f"documents needs one length for each of {len(places)} places, of no more tokens "
                f"than it has; got lens {held[:8]} for cu_seqlens {cuts[:8]}"
            )
        places = [(start, end) for (start, _), end in zip(places, ends, strict=True)]
    return Mask(
        "documents",
        (cuts, rule) if lens is None else (cuts, rule, held),
        cuts[-1],
        lambda _: [
            region
            for start, stop in places
            if start < stop
            for region in _placed(rule.build(stop - start), start, stop)
        ],
    )


def windowed(mask: Mask, left: int | None, right: int | None = 0) -> Mask:
    """What is left of a mask where a query sees no more than `left` keys before its position and
    `right` after; None is no limit.

    For layers with a sliding window in a model whose batches have a mask. Raises
    NotImplementedError for masks that have no such form: all but causal, full, and documents of
    these.
    """
    if mask == causal():
        return sliding_window(left, 0)
    if mask == full():
        return sliding_window(left, right)
    if mask.name == "documents":
        cuts, inner, *lens = mask.args
        return documents(cuts, windowed(inner, left, right), *lens)  # type: ignore[arg-type]
    raise NotImplementedError(
        f"a layer with a sliding window cannot narrow the mask {mask}; give the batch causal() or "
        f"documents(cu_seqlens), or the model no window"
    )


def bidirectional_spans(spans: Iterable[tuple[int, int]], inner: Mask | None = None) -> Mask:
    """`inner` (default causal), and inside each half-open span (start, stop) everybody sees
    everybody.

    For images or other blocks in text. Raises ValueError unless spans ascend without overlap.
    """
    blocks = tuple(map(_span, _listed("spans", spans)))
    edges = [edge for block in blocks for edge in block]
    if sorted(edges) != edges or min(edges, default=0) < 0:
        raise ValueError(
            f"bidirectional_spans needs ascending spans without overlap; got {blocks[:4]}"
        )
    rule = _inner(inner)
    extra = [Region(start, stop, start, stop) for start, stop in blocks if start < stop]
    min_len = max([rule.min_len, *edges])
    return Mask(
        "bidirectional_spans", (blocks, rule), min_len, lambda n: union(rule.build(n), extra)
    )


def tiles(mask: Mask, q_shard: Shard, kv_shard: Shard) -> list[Tile]:
    """The tiles of one pair of shards; `mask.regions(seq_len).tiles` serves many pairs of one
    sequence.
    """
    last = max((span[-1] for span in (*q_shard, *kv_shard)), default=-1)
    return list(mask.regions(max(last + 1, mask.min_len)).tiles(q_shard, kv_shard))


def _listed(name: str, values: Iterable[object]) -> list[Any]:
    try:
        return list(values)
    except TypeError:
        raise ValueError(f"{name} must be a sequence; got {values!r}") from None


def _span(span: Iterable[object]) -> tuple[int, int]:
    edges = _listed("each of spans", span)
    if len(edges) != 2:
        raise ValueError(f"each of spans must be (start, stop); got {edges}")
    return whole_number("the start of a span", edges[0]), whole_number("its stop", edges[1])


def _inner(mask: Mask | None) -> Mask:
    if mask is not None and not isinstance(mask, Mask):
        raise ValueError(f"inner must be a mask, such as causal(); got {mask!r}")
    return mask or causal()


def _placed(regions: Iterable[Region], start: int, stop: int) -> Iterator[Region]:
    """Regions written for positions from 0, moved to `start` and clipped at `stop`."""
    for region in regions:
        moved = region._replace(
            q_start=start + region.q_start,
            q_stop=min(start + region.q_stop, stop),
            k_start=start + region.k_start,
            k_stop=min(start + region.k_stop, stop),
        )
        if not moved.empty:
            yield moved
