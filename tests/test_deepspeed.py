"""Models under DeepSpeed over a ring train as in one process, in every ZeRO stage."""

from collections.abc import Callable
from itertools import product

import pytest
from conftest import World

pytest.importorskip("transformers")
pytest.importorskip("deepspeed")
from deepspeed_runs import Run, errors, wanted

LAYOUTS = ("contiguous", "striped", "zigzag")


def covering(family: str, stage: int) -> list[Run]:
    """All layouts over ring 2 x data 2 and ring 4, with or without accumulation and clipping: all
    four ways of these for Llama; for the other families two, or one in stage 3, the slowest.
    """
    runs = [
        Run(family, stage, ring, layout, accumulation, clip)
        for layout, ring, accumulation, clip in product(LAYOUTS, (2, 4), (1, 2), (False, True))
    ]
    if family == "Llama":
        return runs
    ways = ((0,), (1,), (2,), (3,)) if stage == 3 else ((0, 3), (1, 2))
    return [run for number, run in enumerate(runs) if number % 4 in ways[number // 4 % len(ways)]]


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Mistral", "Gemma2", "GptOss"])
def test_every_stage_layout_and_ring_trains_as_one_process(
    world: Callable[[int], World], family: str, stage: int
) -> None:
    for run in covering(family, stage):
        for worst, *_ in world(4).run(errors, run, wanted(run)):
            assert worst[0] < 1, (str(run), worst)
