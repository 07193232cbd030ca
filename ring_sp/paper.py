"""Tables 1 and 2 and appendices C and D of arXiv:2310.01889v4 from their formulas, beside what the
paper prints. No torch here.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import chain

from ring_sp.hardware import known
from ring_sp.model_shape import PAPER_SIZES

BF16 = 2
SHORT = 4096
"""Tokens of the context that appendix D compares with."""
CONTEXTS = (2, 4, 8, 16, 32, 64, 256, 3072, 32768)
"""Times `SHORT`: the columns of appendix D."""


@dataclass(frozen=True)
class Cell:
    """A number (or formula) of the paper: what its formula gives, what it prints ("" for machines
    that it does not name), and why they differ where they do.
    """

    table: str
    row: str
    column: str
    computed: str
    printed: str
    slip: str = ""

    @property
    def agrees(self) -> bool:
        return self.printed in {self.computed, ""}


Tensors = Counter[str]
"""How many tensors of which dimensions: b batch, n heads, s sequence, c block, h hidden."""

SIZES = {"b": 1, "n": 32, "h": 4096, "s": 1 << 20, "c": 1 << 13}
"""With which the larger of two formulas is found: 7B, 1M tokens, 8k a block."""

_TABLE_1 = {
    # Scores of every pair; the feed-forward's 4h-wide intermediate.
    "vanilla": (Tensors(bnss=1), Tensors(bsh=4), ("2bns^2", "8bsh", "2bhs^2")),
    # Output, and a block of keys and of values.
    "memory-efficient attention": (
        Tensors(bsh=1, bch=2),
        Tensors(bsh=4),
        ("2bsh+4bch", "8bsh", "8bsh"),
    ),
    # Block after block: the output alone is as long as the sequence.
    "+ blockwise feed-forward": (Tensors(bsh=1), Tensors(bsh=1), ("2bsh", "2bsh", "2bsh")),
    # A query, keys and values at hand and arriving, an output; the feed-forward's output.
    "ring": (Tensors(bch=1 + 2 + 2 + 1), Tensors(bch=1), ("6bch", "2bch", "6bch")),
}
_HEADS = "the larger of its two is 2bns^2: it prints the hidden size h for the heads n"
_BLOCKS = "six blocks of bch elements; in bf16, as its other rows count, twice as many bytes"
_SLIPS_1 = {
    ("vanilla", "total"): _HEADS,
    ("ring", "attention"): _BLOCKS,
    ("ring", "total"): _BLOCKS,
}

_TABLE_2 = {
    "A100 NVLink": ("a100", None, ("1.0", "6.2")),
    "A100 InfiniBand": ("a100", 12.5e9, ("24.5", "149.5")),
    "TPU v3": ("tpu-v3", None, ("1.1", "6.6")),
    "TPU v4": ("tpu-v4", None, ("1.0", "6.2")),
    "TPU v5e": ("tpu-v5e", None, ("1.1", "6.3")),
    "H100, H200 NVLink": ("h200", None, ("", "")),
}

_GRID = {
    "7b": "1.1 1.4 2.0 3.1 5.4 10.0 37.4 439.7 4682.0",
    "13b": "1.1 1.4 1.8 2.8 4.6 8.4 31.0 362.3 3855.9",
    "33b": "1.1 1.3 1.6 2.3 3.7 6.5 23.2 268.0 2850.3",
    "65b": "1.1 1.2 1.5 2.2 3.4 5.8 20.6 237.2 2521.5",
    "175b": "1.1 1.2 1.4 1.8 2.6 4.3 14.4 162.6 1725.6",
    "1t": "1.0 1.1 1.1 1.3 1.6 2.1 5.6 56.8 596.8",
}


def table_1() -> list[Cell]:
    """Peak bytes of activations of a layer in bf16."""
    cells = []
    for row, (attention, feed_forward, printed) in _TABLE_1.items():
        total = max(attention, feed_forward, key=_bytes)
        columns = ("attention", "feed-forward", "total")
        for column, tensors, text in zip(
            columns, (attention, feed_forward, total), printed, strict=True
        ):
            slip = _SLIPS_1.get((row, column), "")
            cells.append(Cell("1", row, column, _formula(tensors), text, slip))
    return cells


def least_block(flops: float, bandwidth: float) -> float:
    """Tokens of a block from which on its transfer hides: c >= F / B (section 3)."""
    return flops / bandwidth


def table_2() -> list[Cell]:
    """The least block and sequence, in thousands of tokens, from which on transfers hide."""
    cells, machines = [], known()
    for row, (name, bandwidth, printed) in _TABLE_2.items():
        machine = machines[name]
        block = least_block(machine.peak_flops, bandwidth or machine.link_bandwidth)
        for column, tokens, text in zip(
            ("block, 1e3", "sequence, 1e3"), (block, 6 * block), printed, strict=True
        ):
            computed = f"{tokens / 1e3:.1f}"
            slip = "" if text in {computed, ""} else f"its formula gives {tokens / 1e3:.2f}"
            cells.append(Cell("2", row, column, computed, text, slip))
    return cells


def appendix_c() -> list[Cell]:
    """Bytes a FLOP of a TPU v5e's link at 40% utilisation."""
    machine = known()["tpu-v5e"]
    ratio = machine.link_bandwidth / (0.4 * machine.peak_flops)
    slip = "GB/s over TFLOP/s, a thousand times too large: a ring hides no transfers in decoding"
    return [Cell("C", "TPU v5e, 40% utilisation", "B / F", f"{ratio:.2g}", "2.4", slip)]


def cost_ratio(hidden: int, context: int, short: int = SHORT) -> float:
    """FLOPs of a data set at `context` tokens a sequence over those at `short`: a layer has 24 b s
    h^2 + 4 b s^2 h (appendix D).
    """

    def per_token(length: int) -> int:
        return 24 * hidden**2 + 4 * length * hidden

    return per_token(context) / per_token(short)


def appendix_d() -> list[Cell]:
    """The cost of training on a data set at longer contexts, relative to 4K."""
    named = {3072: "10M", 32768: "100M"}
    cells = []
    for row, printed in _GRID.items():
        for times, text in zip(CONTEXTS, printed.split(), strict=True):
            computed = f"{cost_ratio(PAPER_SIZES[row][1], times * SHORT):.1f}"
            column = f"{times}x"
            slip = named.get(times, "")
            slip = slip and f"{times * SHORT / 1e6:.1f}M tokens, which the paper calls {slip}"
            cells.append(Cell("D", row, column, computed, text, slip))
    return cells


def cells() -> list[Cell]:
    """All of it."""
    return list(chain(table_1(), table_2(), appendix_c(), appendix_d()))


def _bytes(tensors: Tensors) -> int:
    total = 0
    for dims, count in tensors.items():
        size = BF16 * count
        for dim in dims:
            size *= SIZES[dim]
        total += size
    return total


def _formula(tensors: Tensors) -> str:
    terms = (f"{BF16 * count}{dims.replace('ss', 's^2')}" for dims, count in tensors.items())
    return "+".join(terms)
