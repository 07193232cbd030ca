import warnings
from collections.abc import Callable

import pytest
import torch
from conftest import World

pytest.importorskip("megatron")
from megatron.core import __version__, parallel_state
from megatron_gpt import MLA, MOE, MTP, SEQ_LEN, YARN, Case, built, case, start
from megatron_oracle import errors, packed, stock

from ring_sp.integrations.megatron import MegatronRing, install
from ring_sp.integrations.megatron.roll import RollTokens

DOCUMENTS = (0, 8, 32, SEQ_LEN)
DROPOUT = {"attention_dropout": 0.3}
RECOMPUTED = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
WINDOW = {"window_size": (9, 0), "window_attn_skip_freq": 2}


@pytest.mark.parametrize(
    ("size", "given"),
    [
        (1, Case()),
        (4, case(tensor=2, ring=2, config={"sequence_parallel": True})),
        (4, case(ring=4, config=WINDOW)),
        (4, case(ring=4, layout="striped", config={"softmax_type": "learnable", **WINDOW})),
        (4, case(tensor=2, ring=2, config={"softmax_type": "learnable"})),
        (2, case(ring=2, config={"softmax_type": "off-by-one"})),
        (2, case(ring=2, config={"apply_query_key_layer_scaling": True})),
        (2, case(ring=2, config={"softmax_scale": 0.2})),
        (2, case(ring=2, config=MOE)),
        (8, case(tensor=4, ring=2, layout="contiguous")),
        (4, case(ring=4, ulysses=2, layout="striped", positions="learned_absolute")),
        (4, case(ring=4, outer=2, layout="striped", positions="yarn", config=YARN)),
        (4, case(ring=4, cuts=DOCUMENTS)),
        (2, case(ring=2, cuts=DOCUMENTS, lens=(5, 24, 13), config=WINDOW)),
        (4, case(ring=4, layout="striped", cuts=(0, 7, 30, SEQ_LEN))),
        (2, case(ring=2, cuts=(0, 7, 30, SEQ_LEN))),
        (4, case(ring=4, layout="balanced", cuts=(0, 7, 30, SEQ_LEN))),
    ],
    ids=str,
)
def test_a_model_over_a_ring_equals_stock_megatron_on_one_rank(
    world: Callable[[int], World], size: int, given: Case
) -> None:
    data_size = size // (given.tensor * given.ring)
    whole = [world(1).run(stock, given, rank)[0] for rank in range(data_size)]
    for worst, *_ in world(size).run(errors, given, whole):
        assert worst[0] < 1e-11, worst


@pytest.mark.parametrize(
    ("size", "given"),
    [
        (4, case(ring=4, config=MLA)),
        (4, case(ring=4, ulysses=2, layout="striped", config=MLA)),
        (2, case(ring=2, layout="contiguous", config={**MLA, "rope_type": "rope"})),
        (2, case(ring=2, cuts=DOCUMENTS, lens=(5, 24, 13), config=MLA)),
        (4, case(ring=4, layout="striped", ulysses=2, config=DROPOUT)),
        (2, case(ring=2, config={**DROPOUT, **RECOMPUTED})),
    ],
    ids=str,
)
def test_what_stock_megatron_lacks_is_over_a_ring_as_on_a_ring_of_one(
    world: Callable[[int], World], size: int, given: Case
) -> None:
    whole = world(1).run(stock, given, 0, True)
    for worst, *_ in world(size).run(errors, given, whole):
        assert worst[0] < 1e-11, worst


@pytest.mark.skipif(
    not __version__.startswith("0.16"),
    reason="newer Megatrons weigh the extra losses by the tokens of each rank",
)
@pytest.mark.parametrize(
    ("size", "given"),
    [
        (4, case(ring=4, config=MTP)),
        (2, case(ring=2, layout="striped", config=MTP)),
        (2, case(ring=2, layout="contiguous", config=MTP, cuts=(0, 7, 30, SEQ_LEN))),
        (4, case(tensor=2, ring=2, config=MTP, cuts=DOCUMENTS, lens=(5, 24, 13))),
    ],
    ids=str,
)
def test_multi_token_prediction_over_a_ring_equals_one_rank(
    world: Callable[[int], World], size: int, given: Case
) -> None:
    whole = [world(1).run(stock, given, 0)[0]]
    for worst, *_ in world(size).run(errors, given, whole):
        assert worst[0] < 1e-6, "Megatron's losses are in float32" + str(worst)


def warned(given: Case) -> list[str]:
    """What a model's builder is warned of."""
    start(given)
    made = install(given.options)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            built(given)
    finally:
        made.remove()
    return [str(each.message) for each in caught if "those of one rank" in str(each.message)]


def test_where_multi_token_prediction_does_not_it_is_said(world: Callable[[int], World]) -> None:
    newer = not __version__.startswith("0.16")
    for found in world(2).run(warned, case(ring=2, config=MTP)):
        assert ["losses of multi-token prediction" in said for said in found] == [True] * newer
    assert world(1).run(warned, case(config=MTP)) == [[]]


def wrong_rolls(given: Case) -> list[str]:
    """The tensors that a rank's shift of tokens gets wrong."""
    start(given)
    ring = MegatronRing.from_options(given.options, parallel_state.get_context_parallel_group())
    params = packed(given)
    sequence = ring.packed(params).sequence if params else ring.sequence(SEQ_LEN)
    assert sequence is not None
    roll, wrong = RollTokens(lambda: ring), []
    group = parallel_state.get_context_parallel_group()
    for whole in (torch.arange(2 * SEQ_LEN).view(2, -1) + 1, torch.ones(1, SEQ_LEN)):
        wanted = whole.roll(-1, 1)
        wanted[:, torch.tensor((given.cuts or (0, SEQ_LEN))[1:]) - 1] = 0
        rolled, count = roll(sequence.shard(whole), -1, -1, group, params)
        assert rolled is not None
        if not torch.equal(rolled, sequence.shard(wanted)) or count != rolled.sum():
            wrong.append(str(whole.dtype))
    return wrong


@pytest.mark.parametrize("layout", ["zigzag", "striped", "contiguous"])
@pytest.mark.parametrize("cuts", [(), DOCUMENTS, (0, 7, 30, SEQ_LEN)])
def test_tokens_are_shifted_within_their_documents(
    world: Callable[[int], World], layout: str, cuts: tuple[int, ...]
) -> None:
    assert world(4).run(wrong_rolls, case(ring=4, ulysses=2, layout=layout, cuts=cuts)) == [[]] * 4
