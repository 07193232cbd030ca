"""Who sees whom under each mask, written from its definition and not from regions: the oracle of
the tests.
"""

from collections.abc import Callable
from itertools import pairwise

from ring_sp import masks
from ring_sp.masks import Mask

Sees = Callable[[int, int], bool]


def document_of(cu_seqlens: list[int], position: int) -> tuple[int, int] | None:
    """First token and length of the document that holds a position, or None in the padding."""
    for start, stop in pairwise(cu_seqlens):
        if start <= position < stop:
            return start, stop
    return None


def in_documents(cu_seqlens: list[int], inner: Sees) -> Sees:
    def sees(query: int, key: int) -> bool:
        own = document_of(cu_seqlens, query)
        return (
            own is not None
            and own == document_of(cu_seqlens, key)
            and inner(query - own[0], key - own[0])
        )

    return sees


def in_one_span(spans: list[tuple[int, int]], query: int, key: int) -> bool:
    return any(start <= query < stop and start <= key < stop for start, stop in spans)


def before(query: int, key: int) -> bool:
    return key <= query


def cases(seq_len: int) -> dict[str, tuple[Mask, Sees]]:
    """Masks for a sequence of `seq_len` >= 1 tokens with their predicates (query position, key
    position).
    """
    third, half = seq_len // 3, seq_len // 2
    cuts = [0, third // 2, third, third, seq_len - third // 2]
    spans = [(third // 2, third), (half, half + third)]
    window = max(seq_len // 5, 1)
    packed_window = masks.documents(cuts, masks.sliding_window(window))
    return {
        "full": (masks.full(), lambda _q, _k: True),
        "causal": (masks.causal(), before),
        "window": (masks.sliding_window(window), lambda q, k: q - window <= k <= q),
        "two_sided": (masks.sliding_window(window, 2), lambda q, k: q - window <= k <= q + 2),
        "chunked": (
            masks.chunked(window + 1),
            lambda q, k: k <= q and q // (window + 1) == k // (window + 1),
        ),
        "prefix_lm": (masks.prefix_lm(third), lambda q, k: k <= q or k < third),
        "documents": (masks.documents(cuts), in_documents(cuts, before)),
        "documents_window": (packed_window, in_documents(cuts, lambda q, k: q - window <= k <= q)),
        "documents_prefix": (
            masks.documents(cuts, masks.prefix_lm(2)),
            in_documents(cuts, lambda q, k: k <= q or k < 2),
        ),
        "spans": (
            masks.bidirectional_spans(spans),
            lambda q, k: k <= q or in_one_span(spans, q, k),
        ),
        "spans_in_documents": (
            masks.bidirectional_spans(spans, packed_window),
            lambda q, k: (
                in_documents(cuts, lambda a, b: a - window <= b <= a)(q, k)
                or in_one_span(spans, q, k)
            ),
        ),
    }
