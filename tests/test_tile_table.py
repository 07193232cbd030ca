"""A table against the tiles that it was made from."""

from random import Random
from time import perf_counter

import pytest
import torch
from torch import Tensor
from visibility import cases

from ring_sp import layout, masks
from ring_sp.kernels import Step
from ring_sp.kernels.tile_table import ALIGN, TileTable, tile_table
from ring_sp.layout import shard_len
from ring_sp.regions import Tile

CPU = torch.device("cpu")


def seen_by_tiles(tiles: tuple[Tile, ...], shape: tuple[int, int]) -> Tensor:
    """How often each pair is seen, by the definition of a tile."""
    seen = torch.zeros(shape, dtype=torch.int64)
    for tile in tiles:
        rows = torch.arange(tile.q_stop - tile.q_start)[:, None]
        offset = rows - torch.arange(tile.k_stop - tile.k_start)
        band = (tile.lo <= offset) & (offset <= tile.hi)
        seen[tile.q_start : tile.q_stop, tile.k_start : tile.k_stop] += band
    return seen


def seen_by_table(table: TileTable, shape: tuple[int, int], blocks: tuple[int, int]) -> Tensor:
    """The same as a kernel sees them: whole blocks without a mask, others with one."""
    seen = torch.zeros(shape, dtype=torch.int64)
    for block in range(len(table.order)):
        own = slice(block * blocks[0], min((block + 1) * blocks[0], shape[0]))
        rows = torch.arange(shape[0])[own, None]
        for entry in range(int(table.offsets[block]), int(table.offsets[block + 1])):
            row_start, row_stop, lo, hi, start, full_start, full_stop, stop = table.entries.view(
                -1, 8
            )[entry].tolist()
            first = start // ALIGN * ALIGN
            assert start < stop
            assert (full_start - first) % blocks[1] == (full_stop - full_start) % blocks[1] == 0
            seen[own, full_start:full_stop] += 1
            for masked in (slice(first, full_start), slice(full_stop, stop)):
                cols = torch.arange(shape[1])[None, masked]
                band = (lo <= rows - cols) & (rows - cols <= hi) & (start <= cols) & (cols < stop)
                seen[own, masked] += band & (row_start <= rows) & (rows < row_stop)
    return seen


@pytest.mark.parametrize("blocks", [(1, 1), (4, 4), (8, 4), (4, 16)])
def test_sees_what_the_tiles_see(blocks: tuple[int, int]) -> None:
    random = Random(0)
    for number in range(60):
        seq_len, size = random.randint(12, 80), random.randint(1, 3)
        shards = layout.shards(seq_len, size, random.choice(list(layout.LAYOUTS)))
        queries, keys = random.choice(shards), random.choice(shards)
        mask = list(cases(seq_len).values())[number % len(cases(seq_len))][0]
        step = Step(tuple(mask.regions(seq_len).tiles(queries, keys)), 1.0)
        if step.tiles:
            shape = shard_len(queries), shard_len(keys)
            true = seen_by_tiles(step.tiles, shape)
            rows = tile_table(step, CPU, shape[0], blocks)
            assert torch.equal(seen_by_table(rows, shape, blocks), true)
            cols = tile_table(step, CPU, shape[1], blocks, keys=True)
            assert torch.equal(seen_by_table(cols, shape[::-1], blocks), true.T)


def test_leaves_out_keys_that_no_query_of_their_tile_sees() -> None:
    step = Step((Tile(0, 16, 0, 64, -4, 15), Tile(16, 32, 40, 64, -23, 15)), 1.0)
    table = tile_table(step, CPU, 64, (16, 16), keys=True)
    assert table.offsets.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(
        seen_by_table(table, (64, 32), (16, 16)), seen_by_tiles(step.tiles, (32, 64)).T
    )


def test_starts_with_the_heaviest_block_and_ends_with_those_that_see_nothing() -> None:
    causal, beside = Tile(16, 48, 0, 32, 0, 31), Tile(48, 50, 0, 2, -1, 1)
    table = tile_table(Step((causal, beside), 1.0), CPU, 80, (16, 16))
    assert table.order.tolist()[:3] == [2, 1, 3] and table.num_active == 3


def test_of_ten_thousand_documents_is_made_once_and_soon() -> None:
    cuts = list(range(0, 260_001, 26))
    regions = masks.documents(cuts).regions(260_000)
    shard = layout.shards(260_000, 1, "contiguous")[0]
    step = Step(tuple(regions.tiles(shard, shard)), 1.0)
    assert len(step.tiles) == 10_000
    start = perf_counter()
    table = tile_table(step, CPU, 260_000, (128, 128))
    assert perf_counter() - start < 1
    assert tile_table(step, CPU, 260_000, (128, 128)) is table
