"""Models under DeepSpeed over a ring train as in one process, in every ZeRO stage."""

from collections.abc import Callable
from itertools import product

import pytest
from conftest import World

pytest.importorskip("transformers")
pytest.importorskip("deepspeed")
from deepspeed_runs import Run, errors, wanted

LAYOUTS = ("contiguous", "striped", "zigzag")


def runs(family: str, stage: int) -> list[Run]:
    """All layouts over ring 2 x data 2 and ring 4, with and without accumulation and clipping."""
    places = product((2, 4), LAYOUTS, (1, 2), (False, True))
    return [Run(family, stage, *place) for place in places]


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Mistral", "Gemma2", "GptOss"])
def test_every_stage_layout_and_ring_trains_as_one_process(
    world: Callable[[int], World], family: str, stage: int
) -> None:
    for run in runs(family, stage):
        for worst, *_ in world(4).run(errors, run, wanted(run)):
            assert worst[0] < 1, (str(run), worst)
