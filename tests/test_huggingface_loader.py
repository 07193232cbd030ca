"""Each rank of a ring gets its part of each batch that the ring trains on, and no batch is lost."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import World
from ranks import groups, raised
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

pytest.importorskip("transformers")

from ring_sp.integrations.huggingface import HuggingFaceRing, RingLoader

Found = tuple[int | None, list[tuple[list[list[int]], list[int]]]]
"""The length of a loader; of each batch that it gave, the whole tokens and the whole next ones."""


def numbered(number: int, length: int = 9, labels: bool = True) -> dict[str, Tensor]:
    """A batch that can be told from others; packed where its number is odd."""
    tokens = torch.arange(length)[None] + 100 * number
    made = {"input_ids": tokens}
    if number % 2:
        made["position_ids"] = torch.cat([torch.arange(4), torch.arange(length - 4)])[None]
    return {**made, "labels": tokens.clone()} if labels else made


def given(ring: HuggingFaceRing, numbers: list[list[list[int]]]) -> list[dict[str, Tensor]]:
    """Those of this rank; `numbers` are of each data rank and each rank of its ring."""
    own = numbers[ring.manager.rank("data")][ring.manager.rank("sequence")]
    return [numbered(number, 9 + number) for number in own]


def found(loader: RingLoader) -> Found:
    batches = []
    for part in loader:
        assert part.shift_labels is not None and part.inputs["ring_sp"].sequence is part.sequence
        tokens = part.sequence.unshard(part.inputs["input_ids"])
        labels = part.sequence.unshard(part.shift_labels)[0].tolist()
        batches.append((tokens.tolist(), labels))
    return len(loader), batches


def read(numbers: list[list[list[int]]], source: str) -> Found:
    ring = HuggingFaceRing(groups(ring=2))
    return found(RingLoader(given(ring, numbers), ring, source))


def labels_of(number: int) -> list[int]:
    whole = numbered(number, 9 + number)["labels"][0].tolist()
    ends = [3, len(whole) - 1] if number % 2 else [len(whole) - 1]
    return [-100 if n in ends else token + 1 for n, token in enumerate(whole)]


def wanted(numbers: list[int], steps: int) -> Found:
    """Batches in order, and the last again without labels until there are `steps`."""
    batches = [
        (numbered(number, 9 + number)["input_ids"].tolist(), labels_of(number))
        for number in numbers
    ]
    tokens = batches[-1][0]
    return steps, batches + [(tokens, [-100] * len(tokens[0]))] * (steps - len(batches))


@pytest.mark.parametrize(
    ("source", "numbers", "data0", "data1"),
    [
        ("same", [[[1, 2]] * 2, [[3, 4]] * 2], [1, 2], [3, 4]),
        ("same", [[[1, 2, 5]] * 2, [[3]] * 2], [1, 2, 5], [3]),
        ("first", [[[1, 2, 5], []], [[3], [7, 8]]], [1, 2, 5], [3]),
        ("turns", [[[1, 2], [3, 4]], [[5, 6], [7, 8]]], [1, 3, 2, 4], [5, 7, 6, 8]),
        ("turns", [[[1], [2, 3, 4]], [[5], []]], [1, 2, 3, 4], [5]),
    ],
)
def test_every_batch_is_trained_on_once_and_rings_take_equally_many_steps(
    world: Callable[[int], World],
    source: str,
    numbers: list[list[list[int]]],
    data0: list[int],
    data1: list[int],
) -> None:
    results = world(4).run(read, numbers, source)
    steps = max(len(data0), len(data1))
    assert results[0] == results[1] == wanted(data0, steps)
    assert results[2] == results[3] == wanted(data1, steps)


def shuffled(source: str) -> list[Found]:
    """Two epochs of a loader whose sampler shuffles by epoch."""
    ring = HuggingFaceRing(groups(ring=2))
    manager = ring.manager
    rows: Any = [numbered(number)["input_ids"][0] for number in range(8)]
    place: Any = {"num_replicas": manager.size("data"), "rank": manager.rank("data")}
    sampler: Any = DistributedSampler(rows, **({} if source == "turns" else place))
    whole: Any = DataLoader(rows, 2, sampler=sampler, collate_fn=collated)
    loader = RingLoader(whole, ring, source)
    epochs = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        epochs.append(found(loader))
    return epochs


def collated(rows: list[Tensor]) -> dict[str, Tensor]:
    return {"input_ids": torch.stack(rows), "labels": torch.stack(rows)}


@pytest.mark.parametrize("source", ["same", "turns"])
def test_epochs_shuffle_and_cover_the_data_once(world: Callable[[int], World], source: str) -> None:
    results = world(4).run(shuffled, source)
    assert results[0] == results[1] and results[2] == results[3]
    for epoch in range(2):
        (count, one), (same, other) = results[0][epoch], results[2][epoch]
        assert count == same == len(one) == len(other) == 2
        rows = [row[0] // 100 for tokens, _ in one + other for row in tokens]
        assert sorted(rows) == list(range(8))
    assert results[0][0] != results[0][1]


def test_a_ring_without_any_batch_gets_anothers_without_labels(
    world: Callable[[int], World],
) -> None:
    results = world(4).run(read, [[[1, 2]] * 2, [[]] * 2], "same")
    tokens = numbered(1, 10)["input_ids"].tolist()
    assert results[:2] == [wanted([1, 2], 2)] * 2
    assert results[2:] == [(2, [(tokens, [-100] * 10)] * 2)] * 2


def refused() -> list[str]:
    """What is said on this rank of batches that do not go together."""
    ring = HuggingFaceRing(groups(ring=2))
    data, rank = ring.manager.rank("data"), ring.manager.rank("sequence")

    def said(batches: list[Any], source: str = "same") -> str:
        return raised(lambda: list(RingLoader(batches, ring, source)))

    bad = {**numbered(1), "pixel_values": torch.zeros(1)}
    return [
        said([numbered(2 * data + rank)]),
        said([numbered(data)] * (1 + rank)),
        said([numbered(data)], "turns"),
        said([numbered(data, labels=False)] * (1 + data)),
        said([bad if data else numbered(1)]),
        said([{**numbered(1), "labels": numbered(1)["labels"] + 500 * rank}]),
        said([], "last"),
    ]


def test_batches_that_do_not_go_together_are_refused_on_all_ranks(
    world: Callable[[int], World],
) -> None:
    words = [
        "those of data rank 0 differ",
        "those of data rank 0 differ",
        "all read the same. Say source='same'",
        "a batch without labels cannot be repeated",
        "does not know how to cut pixel_values",
        "those of data rank 0 differ",
        "source must be one of same, first, turns; got 'last'",
    ]
    for said in world(4).run(refused):
        for text, word in zip(said, words, strict=True):
            assert word in text, (word, text)


class Endless:
    """A loader without a length."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter([numbered(0), numbered(1)])


def test_a_loader_without_length_has_none_and_seeds_follow_batch_and_epoch() -> None:
    loader = RingLoader(Endless(), HuggingFaceRing(groups()), dropout_seed=3)
    with pytest.raises(TypeError, match="Endless on some rank has no length"):
        len(loader)
    seeds = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        seeds += [part.inputs["ring_sp"].dropout_seed for part in loader]
    assert len(set(seeds)) == 4 and seeds[0] == 3
    again = RingLoader(Endless(), HuggingFaceRing(groups()), dropout_seed=3, device="meta")
    parts = list(again)
    assert [part.inputs["ring_sp"].dropout_seed for part in parts] == seeds[:2]
    assert all(part.inputs["input_ids"].is_meta for part in parts)
