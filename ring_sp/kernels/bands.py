"""How the tiles of a step become few calls of a library. No torch here."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from ring_sp.regions import Tile

REACH = 8
"""Earlier tiles that a tile is tried with; those of one region follow each other."""
KINDS = 8
"""Bands that a tile is tried with, the most frequent first."""


class Band(NamedTuple):
    """What a row sees, counted from the diagonal through the last row and the last column: `left`
    keys before it and `right` after it; None is no limit.

    A tile's own sides are never below 0, since its last row and its last column see something.
    """

    left: int | None
    right: int | None


def band_of(tile: Tile) -> Band:
    """The tile's band, with a limit only where one binds."""
    rows, cols = _shape(tile)
    return Band(
        None if tile.hi == rows - 1 else tile.hi + cols - rows,
        None if tile.lo == 1 - cols else rows - cols - tile.lo,
    )


def coalesce(tiles: Iterable[Tile]) -> list[Tile]:
    """The same pairs in fewer tiles, where several together are one banded rectangle.

    The three tiles in which a zigzag shard meets itself under a causal mask become one causal tile.
    """
    found: list[Tile] = []
    for tile in sorted(tiles, key=lambda tile: (tile.q_start, tile.k_start)):
        pending: Tile | None = tile
        while pending is not None:
            pending = _absorb(found, pending)
    return found


def waves(tiles: Iterable[Tile]) -> list[tuple[Band, list[Tile]]]:
    """The tiles in few groups of one band each, in which rows and columns ascend without overlap:
    what one call for many sequences can do.
    """
    own = [(tile, band_of(tile)) for tile in sorted(tiles)]
    frequent = [band for band, _ in Counter(band for _, band in own).most_common(KINDS)]
    found: dict[Band, list[list[Tile]]] = {}
    for tile, own_band in own:
        band = next((band for band in frequent if _expresses(band, tile, own_band)), own_band)
        groups = found.setdefault(band, [])
        for group in groups:
            if group[-1].q_stop <= tile.q_start and group[-1].k_stop <= tile.k_start:
                group.append(tile)
                break
        else:
            groups.append([tile])
    return [(band, group) for band, groups in found.items() for group in groups]


def without_stairs(tile: Tile) -> list[Tile]:
    """A tile whose band has no left limit, cut into full tiles and causal squares.

    For libraries that know nothing else, and differ in where the diagonal of a causal rectangle
    lies.
    """
    rows, cols = _shape(tile)
    if tile.full:
        return [tile]
    if tile.hi != rows - 1:
        raise ValueError(f"{tile} hides keys on the left of a diagonal")
    # Rows up to the first that sees all, and as many columns: the last ones.
    side = cols + tile.lo
    q_cut, k_cut = tile.q_start + side, tile.k_stop - side
    pieces = [
        _rectangle(tile.q_start, q_cut, tile.k_start, k_cut),
        Tile(tile.q_start, q_cut, k_cut, tile.k_stop, 0, side - 1),
        _rectangle(q_cut, tile.q_stop, tile.k_start, tile.k_stop),
    ]
    return [piece for piece in pieces if piece is not None]


def _rectangle(q_start: int, q_stop: int, k_start: int, k_stop: int) -> Tile | None:
    rows, cols = q_stop - q_start, k_stop - k_start
    return Tile(q_start, q_stop, k_start, k_stop, 1 - cols, rows - 1) if rows and cols else None


def _shape(tile: Tile) -> tuple[int, int]:
    return tile.q_stop - tile.q_start, tile.k_stop - tile.k_start


def _absorb(found: list[Tile], tile: Tile) -> Tile | None:
    """Append a tile; or take out the one that it joins, and return the two together."""
    for at in range(len(found) - 1, max(len(found) - 1 - REACH, -1), -1):
        joint = _join(found[at], tile)
        if joint is not None:
            del found[at]
            return joint
    found.append(tile)
    return None


def _join(a: Tile, b: Tile) -> Tile | None:
    """The tile that two disjoint ones form together, if they do."""
    q_start, q_stop = min(a.q_start, b.q_start), max(a.q_stop, b.q_stop)
    k_start, k_stop = min(a.k_start, b.k_start), max(a.k_stop, b.k_stop)
    diagonals = [tile.q_start - tile.k_start - q_start + k_start for tile in (a, b)]
    lo = min(tile.lo + diagonal for tile, diagonal in zip((a, b), diagonals, strict=True))
    hi = max(tile.hi + diagonal for tile, diagonal in zip((a, b), diagonals, strict=True))
    joint = Tile(
        q_start,
        q_stop,
        k_start,
        k_stop,
        max(lo, 1 - k_stop + k_start),
        min(hi, q_stop - q_start - 1),
    )
    # It holds the pairs of both, so with as many pairs it holds no others. Documents of one token
    # would make a window of no width: they are better left to a wave.
    limited = joint.hi < q_stop - q_start - 1 and all(x.hi == _shape(x)[0] - 1 for x in (a, b))
    return None if limited or joint.area != a.area + b.area else joint


def _expresses(band: Band, tile: Tile, own: Band) -> bool:
    """Whether a band shows the tile's pairs and no others: its limits are the tile's own, or lie
    beyond all keys.
    """
    rows, cols = _shape(tile)
    return all(
        limit == mine or (mine is None and limit is not None and limit >= beyond)
        for limit, mine, beyond in zip(band, own, (cols - 1, rows - 1), strict=True)
    )
