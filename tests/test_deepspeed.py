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
    four ways of these for Llama, two for the other families.
    """
    places = product(LAYOUTS, (2, 4), (1, 2), (False, True))
    return [
        Run(family, stage, ring, layout, accumulation, clip)
        for number, (layout, ring, accumulation, clip) in enumerate(places)
        if family == "Llama" or (number % 4 in (0, 3)) == bool((number // 4 + stage) % 2)
    ]


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Mistral", "Gemma2", "GptOss"])
def test_every_stage_layout_and_ring_trains_as_one_process(
    world: Callable[[int], World], family: str, stage: int
) -> None:
    for run in covering(family, stage):
        for worst, *_ in world(4).run(errors, run, wanted(run)):
            assert worst[0] < 1, (str(run), worst)
