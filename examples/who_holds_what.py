"""Draw who holds which tokens in each layout, and the work of a causal mask at each hop.

python examples/who_holds_what.py [PICTURE.png]
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from rich.console import Console

from ring_sp import layout, masks

RANKS, TOKENS = 4, 32
LAYOUTS = ("contiguous", "striped", "zigzag")
"""Under a causal mask "balanced" is zigzag, for sequences longer than these."""
COLORS = ("#4477aa", "#ccbb44", "#228833", "#ee6677")


def holders(name: str) -> list[int]:
    """The rank of each position."""
    shards = layout.shards(TOKENS, RANKS, name)
    return [
        rank
        for position in range(TOKENS)
        for rank, shard in enumerate(shards)
        if any(position in span for span in shard)
    ]


def work(name: str) -> list[list[int]]:
    """Visible pairs that each rank works on, hop by hop: at hop h, rank r has the keys of r - h."""
    shards, regions = layout.shards(TOKENS, RANKS, name), masks.causal().regions(TOKENS)
    return [
        [
            sum(tile.area for tile in regions.tiles(shards[rank], shards[(rank - hop) % RANKS]))
            for rank in range(RANKS)
        ]
        for hop in range(RANKS)
    ]


def busy(name: str) -> float:
    """Share of the time that ranks work, if at each hop all wait for the one with most to do."""
    hops = work(name)
    return sum(map(sum, hops)) / (RANKS * sum(map(max, hops)))


def print_layouts(console: Console) -> None:
    console.print(f"\n{TOKENS} tokens over {RANKS} ranks, and the time a causal mask takes:")
    for name in LAYOUTS:
        cells = "".join(f"[black on {COLORS[rank]}]{rank}[/]" for rank in holders(name))
        console.print(f"  {name:<11} {cells}  ranks busy {busy(name):.0%} of it")


def draw(path: Path) -> None:
    figure, axes = plt.subplots(
        2, len(LAYOUTS), figsize=(11, 6.2), height_ratios=(3, 1), layout="constrained"
    )
    for (above, below), name in zip(axes.T, LAYOUTS, strict=True):
        ranks = holders(name)
        cells = [
            [ranks[q] if k <= q else float("nan") for k in range(TOKENS)] for q in range(TOKENS)
        ]
        above.imshow(cells, cmap=ListedColormap(COLORS), vmin=0, vmax=RANKS - 1)
        above.set(
            title=f"{name}: ranks busy {busy(name):.0%}",
            xlabel="key",
            ylabel="query",
            xticks=[],
            yticks=[],
        )
        hops = work(name)
        for rank, color in enumerate(COLORS):
            places = [hop + (rank - (RANKS - 1) / 2) * 0.2 for hop in range(RANKS)]
            below.bar(places, [hop[rank] for hop in hops], 0.18, color=color, label=f"rank {rank}")
        below.set(xlabel="hop", xticks=range(RANKS), ylim=(0, 1.05 * (TOKENS // RANKS) ** 2))
    axes[1][0].set_ylabel("visible pairs")
    axes[1][2].legend(ncols=2, fontsize=8, loc="upper right")
    figure.suptitle("Whose queries see which keys, and the work of each rank at each hop")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    print_layouts(Console())
    if len(sys.argv) > 1:
        draw(Path(sys.argv[1]))
        print(f"drawn in {sys.argv[1]}")


if __name__ == "__main__":
    main()
