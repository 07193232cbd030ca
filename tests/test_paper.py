"""The paper's tables from formulas, against the numbers that it prints."""

from fractions import Fraction

import pytest

from ring_sp import hardware, paper
from ring_sp.model_shape import PAPER_SIZES

PRINTED_2 = {
    # TFLOP/s, HBM GB, GB/s -> block, sequence, in thousands of tokens.
    "A100 NVLink": (312, 80, 300, 1.0, 6.2),
    "A100 InfiniBand": (312, 80, 12.5, 24.5, 149.5),
    "TPU v3": (123, 16, 112, 1.1, 6.6),
    "TPU v4": (275, 32, 268, 1.0, 6.2),
    "TPU v5e": (196, 16, 186, 1.1, 6.3),
}


def test_every_cell_is_as_printed_or_says_why_not() -> None:
    cells = paper.cells()
    assert len(cells) == 12 + 12 + 1 + 6 * 9
    differ = {(cell.table, cell.row, cell.column) for cell in cells if not cell.agrees}
    assert differ == {
        ("1", "vanilla", "total"),
        ("1", "ring", "attention"),
        ("1", "ring", "total"),
        ("2", "A100 InfiniBand", "block, 1e3"),
        ("2", "A100 InfiniBand", "sequence, 1e3"),
        ("C", "TPU v5e, 40% utilisation", "B / F"),
    }
    assert all(cell.slip for cell in cells if not cell.agrees)
    slips = [cell for cell in cells if cell.slip and cell.agrees]
    assert {cell.column for cell in slips} == {"3072x", "32768x"}


def test_table_2_follows_from_its_own_columns() -> None:
    found = {(cell.row, cell.column): cell for cell in paper.table_2()}
    for row, (flops, memory, bandwidth, block, sequence) in PRINTED_2.items():
        least = flops / bandwidth
        cells = found[row, "block, 1e3"], found[row, "sequence, 1e3"]
        assert [cell.printed for cell in cells] == [f"{block:.1f}", f"{sequence:.1f}"]
        assert [cell.computed for cell in cells] == [f"{least:.1f}", f"{6 * least:.1f}"]
        name = row.lower().replace("tpu ", "tpu-").split()[0]
        assert hardware.find(name).peak_flops == flops * 1e12
        assert hardware.find(name).memory_bytes == memory * 1e9
    ours = [found["H100, H200 NVLink", column] for column in ("block, 1e3", "sequence, 1e3")]
    assert [(cell.computed, cell.printed) for cell in ours] == [("2.2", ""), ("13.2", "")]


def test_appendix_c_is_off_by_the_thousand_of_its_units() -> None:
    (cell,) = paper.appendix_c()
    assert float(cell.computed) == float(cell.printed) / 1000
    assert cell.computed == f"{186e9 / (0.4 * 196e12):.4f}"


@pytest.mark.parametrize(("size", "hidden"), [(k, h) for k, (_, h) in PAPER_SIZES.items()])
def test_appendix_d_is_the_ratio_of_flops(size: str, hidden: int) -> None:
    row = [cell for cell in paper.appendix_d() if cell.row == size]
    for cell, times in zip(row, paper.CONTEXTS, strict=True):
        # (6h + s2) / (6h + s1), the same with 4h taken out.
        exact = Fraction(6 * hidden + 4096 * times, 6 * hidden + 4096)
        assert abs(float(exact) - float(cell.printed)) <= 0.0501
        assert cell.computed == f"{float(exact):.1f}"


def test_table_1_counts_tensors() -> None:
    found = {(cell.row, cell.column): cell.computed for cell in paper.table_1()}
    assert found["memory-efficient attention", "attention"] == "2bsh+4bch"
    assert found["vanilla", "total"] == found["vanilla", "attention"] == "2bns^2"
    # Query, two of keys and values, two arriving, output: 2 bytes each.
    assert found["ring", "total"] == f"{2 * 6}bch"
