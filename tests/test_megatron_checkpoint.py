"""Megatron's distributed checkpoints, saved over one ring and resumed over another.

Not with its distributed optimizer, whose own loading wants Transformer Engine or apex.
"""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from conftest import World

pytest.importorskip("megatron")
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron_on_cpu import OnCpu
from test_megatron_training import Options, build, train

SINKS = {"softmax_type": "learnable"}


def state(model: Any, optimizer: Any, loading: bool) -> dict[str, Any]:
    """What Megatron's scripts save, but for the iteration and random numbers."""
    weights = model.module.sharded_state_dict()
    # Megatron takes the dictionary apart.
    again = model.module.sharded_state_dict()
    return {"model": weights, "optimizer": optimizer.sharded_state_dict(again, loading)}


def trained(options: Options, source: Path | None, target: Path | None) -> list[float]:
    """Losses and norms of two steps, from the checkpoint in `source`, saved in `target`."""
    with OnCpu():
        (model,), optimizer, ring = build(options)
        if source is not None:
            wanted = state(model, optimizer, True)
            found = dist_checkpointing.load(wanted, str(source))
            model.module.load_state_dict(found["model"])
            optimizer.load_state_dict(found["optimizer"])
    told = train([model], optimizer, ring)
    if target is not None:
        save(model, optimizer, target)
    return told


def save(model: Any, optimizer: Any, target: Path) -> None:
    """Megatron writes in processes of its own, which a rank of the tests may not have."""
    ours = multiprocessing.current_process()
    with OnCpu(), mock.patch.dict(vars(ours)["_config"], daemon=False):
        dist_checkpointing.save(state(model, optimizer, False), str(target))
    # The last of them serves this queue.
    filesystem_async._results_queue = None


@pytest.mark.parametrize(
    ("size", "options", "resumed_size", "resumed"),
    [
        (2, {"ring": 2}, 4, {"ring": 4, "layout": "striped"}),
        (4, {"ring": 2, "tensor": 2}, 2, {"ring": 2}),
        (1, {}, 4, {"ring": 2, "tensor": 2, "layout": "contiguous"}),
    ],
    ids=str,
)
def test_a_run_goes_on_over_another_ring(
    world: Callable[[int], World],
    tmp_path: Path,
    size: int,
    options: Options,
    resumed_size: int,
    resumed: Options,
) -> None:
    first, alone = tmp_path / "ring", tmp_path / "alone"
    for folder in (first, alone):
        folder.mkdir()
    config = {"config": SINKS}
    before = world(1).run(trained, config, None, alone)[0]
    wanted = world(1).run(trained, config, alone, None)[0]
    assert wanted != pytest.approx(before, rel=1e-3), "the checkpoint says something"
    world(size).run(trained, {**options, **config}, None, first)
    for told in world(resumed_size).run(trained, {**resumed, **config}, first, None):
        assert told == pytest.approx(wanted, rel=1e-5)
