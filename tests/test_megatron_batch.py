from collections.abc import Callable
from inspect import signature
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import World

pytest.importorskip("megatron")
from megatron.core import parallel_state, utils
from megatron.core.packed_seq_params import PackedSeqParams
from megatron_gpt import SEQ_LEN, VOCAB, Case, batch, built, case, start
from ranks import raised
from torch import Tensor

from ring_sp.integrations.megatron import MegatronRing, install
from ring_sp.integrations.megatron.batch import SplitBatch, SplitPackedBatch

Split = Callable[..., dict[str, Any]]


def split_of(given: Case) -> tuple[MegatronRing, Split]:
    start(given)
    group = parallel_state.get_context_parallel_group()
    ring = MegatronRing.from_options(given.options, group)
    return ring, SplitBatch(lambda: ring, signature(utils.get_batch_on_this_cp_rank))


def whole(rows: int = 2) -> dict[str, Any]:
    tokens = torch.arange(rows * SEQ_LEN).view(rows, SEQ_LEN)
    later = torch.ones(1, 1, SEQ_LEN, SEQ_LEN, dtype=torch.bool).triu(1)
    return {
        "tokens": tokens,
        "labels": tokens + 1,
        "loss_mask": tokens.double(),
        "position_ids": tokens % SEQ_LEN,
        "attention_mask": later,
        "cu_seqlens": None,
        "max_seqlen": None,
    }


def called(split: Split, given: dict[str, Any], **extra: Any) -> dict[str, Any]:
    """The split of a batch, asked for as this Megatron's scripts do."""
    known = signature(utils.get_batch_on_this_cp_rank).parameters
    options = {"is_hybrid_cp": False, "cp_group": parallel_state.get_context_parallel_group()}
    options.update(extra)
    return split(given, **{name: value for name, value in options.items() if name in known})


def wrong_parts(given: Case) -> list[str]:
    ring, split = split_of(given)
    expected, sequence = whole(), ring.sequence(SEQ_LEN)
    # Of a script's own: of each token, and of each row.
    expected["embeddings"] = torch.randn(2, SEQ_LEN, 3)
    expected["dataset_id"] = torch.arange(2)
    own = called(split, dict(expected))
    keys = ("tokens", "labels", "loss_mask", "position_ids", "embeddings")
    wrong = [key for key in keys if not torch.equal(own[key], sequence.shard(expected[key], 1))]
    wrong += [key for key in ("attention_mask", "cu_seqlens") if own[key] is not None]
    return wrong if torch.equal(own["dataset_id"], torch.arange(2)) else [*wrong, "dataset_id"]


@pytest.mark.parametrize(
    "given",
    [
        case(ring=4),
        case(tensor=2, ring=2, layout="striped"),
        case(ring=4, ulysses=2, layout="contiguous"),
        case(ring=4, outer=2),
    ],
    ids=str,
)
def test_a_batch_is_cut_as_the_ring_holds_it(world: Callable[[int], World], given: Case) -> None:
    assert world(4).run(wrong_parts, given) == [[]] * 4


def stock_parts() -> bool:
    """Whether a rank's part in zigzag layout is that of Megatron itself."""
    _, split = split_of(case(ring=4))
    ours, theirs = whole(), whole()
    del theirs["attention_mask"]
    theirs = called(utils.get_batch_on_this_cp_rank, theirs)
    return torch.equal(called(split, ours)["tokens"], theirs["tokens"])


def test_zigzag_parts_are_megatrons(world: Callable[[int], World]) -> None:
    assert all(world(4).run(stock_parts))


def packed_parts(cuts: list[int], layout: str) -> tuple[list[int], list[int]]:
    """Tokens of this rank, and those that it should have."""
    ring, _ = split_of(case(ring=2, layout=layout))
    given = {key: value for key, value in whole(1).items() if key != "attention_mask"}
    cu_seqlens = torch.tensor(cuts, dtype=torch.int32)
    split = SplitPackedBatch(lambda: ring)
    own, params = split(given, cu_seqlens, cu_seqlens, torch.tensor([SEQ_LEN]))
    place = ring.packed(params)
    assert place.sequence is not None
    local = place.positions()
    documents = [tokens for start_, stop in pairwise(cuts) for tokens in range(stop - start_)]
    assert local.tolist() == [documents[token] for token in own["tokens"][0]]
    wanted = ring.sequence(SEQ_LEN).positions().tolist()
    if layout == "zigzag" and not any(cut % 4 for cut in cuts):
        rank, wanted = dist.get_rank(), []
        for start_, stop in pairwise(cuts):
            chunk = (stop - start_) // 4
            for part in (rank, 3 - rank):
                wanted += range(start_ + part * chunk, start_ + (part + 1) * chunk)
    return own["tokens"][0].tolist(), wanted


@pytest.mark.parametrize("layout", ["zigzag", "striped"])
@pytest.mark.parametrize("cuts", [[0, 8, 8, 32, SEQ_LEN], [0, 7, 30, SEQ_LEN]])
def test_packed_documents_are_cut_one_by_one_in_zigzag_where_they_divide(
    world: Callable[[int], World], cuts: list[int], layout: str
) -> None:
    for own, wanted in world(2).run(packed_parts, cuts, layout):
        assert own == wanted


def refused() -> dict[str, str]:
    ring, split = split_of(case(ring=2))
    documents = whole(1)
    documents["attention_mask"][..., 20:, :20] = True
    two_rows = {**whole(2), "cu_seqlens": torch.tensor([[0, SEQ_LEN]] * 2)}
    made = install(ring_options := case(ring=2).options)
    try:
        early = raised(called, utils.get_batch_on_this_cp_rank, whole())
        twice = raised(install, ring_options)
    finally:
        made.remove()
    return {
        "document mask": raised(called, split, documents),
        "two packed rows": raised(called, split, two_rows),
        "no model yet": early,
        "twice": twice,
        "another size": raised(
            MegatronRing.from_options, case(ring=4).options, ring.topology.group
        ),
    }


def test_what_cannot_be_cut_is_refused(world: Callable[[int], World]) -> None:
    messages = {
        "document mask": "not plain causal",
        "two packed rows": "got 2 rows",
        "no model yet": "build the model first",
        "twice": "install was called twice",
        "another size": "asks for 4 ranks, and Megatron's context-parallel group has 2",
    }
    for answers in world(2).run(refused):
        for name, message in messages.items():
            assert message in answers[name], (name, answers[name])


def group_of_its_own() -> Tensor:
    """How far a model's logits over half of its context-parallel group, and over one rank, are from
    those over all of it.
    """
    given = case(ring=4, config={"context_parallel_size": 4})
    start(given)
    made = install(given.options)
    try:
        model = built(given)
        ring = made.built_ring()
    finally:
        made.remove()
    tokens, _ = batch(given, 0)
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    results = []
    longest = {"max_seqlen_q": SEQ_LEN, "max_seqlen_kv": SEQ_LEN}
    for params in (
        None,
        PackedSeqParams("sbhd", cp_group=halves[dist.get_rank() // 2], local_cp_size=2, **longest),
        PackedSeqParams("sbhd", local_cp_size=1, **longest),
    ):
        sequence = ring.sequence(SEQ_LEN, None, ring.topology_of(params))
        own = sequence.shard(tokens)
        positions = sequence.positions().expand_as(own)
        logits = model(own, positions, None, packed_seq_params=params)
        results.append(sequence.unshard(logits.detach()))
    assert results[0].shape == (2, SEQ_LEN, VOCAB)
    return torch.stack([(one - results[0]).abs().max() for one in results[1:]])


def test_a_batch_may_live_on_a_group_of_its_own(world: Callable[[int], World]) -> None:
    for distance in world(4).run(group_of_its_own):
        assert distance.max() < 1e-12


def dynamic_parts(size: int) -> tuple[list[int], list[int]]:
    """Tokens of this rank in a batch for `size` ranks of four, and those that it should have."""
    ring, split = split_of(case(ring=4))
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups = {2: halves[dist.get_rank() // 2], 4: ring.topology.group}
    given = {**whole(1), "cu_seqlens": torch.tensor([[0, SEQ_LEN]])}
    given["local_cp_size"] = torch.tensor([size])
    asked = {"is_hybrid_cp": True, "hybrid_cp_group_func": lambda group_size: groups[group_size]}
    own = called(split, given, **asked)
    assert own.get("hybrid_cp_group") is groups.get(size)
    place = ring.sequence(
        SEQ_LEN, None, ring.topology_of(PackedSeqParams(cp_group=groups.get(size)))
    )
    wanted = place.positions() if size > 1 else torch.arange(SEQ_LEN)
    return own["tokens"][0].tolist(), wanted.tolist()


@pytest.mark.skipif(
    "is_hybrid_cp" not in signature(utils.get_batch_on_this_cp_rank).parameters,
    reason="Megatron-core says the size of a batch's group to its split from 0.18 on",
)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_batch_is_cut_for_the_group_that_it_asks_for(
    world: Callable[[int], World], size: int
) -> None:
    for own, wanted in world(4).run(dynamic_parts, size):
        assert own == wanted
