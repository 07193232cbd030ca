from collections.abc import Callable

import pytest
from conftest import World

pytest.importorskip("megatron")
from megatron_gpt import MOE, SEQ_LEN, Case, case, errors, stock

DOCUMENTS = (0, 8, 32, SEQ_LEN)
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
        (4, case(ring=4, ulysses=2, layout="striped", positions="learned_absolute")),
        (4, case(ring=4, cuts=DOCUMENTS)),
        (2, case(ring=2, cuts=DOCUMENTS, lens=(5, 24, 13), config=WINDOW)),
        (4, case(ring=4, layout="striped", cuts=(0, 7, 30, SEQ_LEN))),
        (2, case(ring=2, cuts=(0, 7, 30, SEQ_LEN))),
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
