"""A chunked loss under DeepSpeed has the gradients of one process, weights partitioned or not."""

from collections.abc import Callable

import pytest
import torch
from conftest import World

pytest.importorskip("transformers")
pytest.importorskip("deepspeed")
from deepspeed.utils import safe_get_full_grad
from deepspeed_runs import Run, Trained, apart, destroy, model_of, one_process, sgd, start
from hf_models import batch
from ranks import groups

from ring_sp.integrations.deepspeed import gradient_divisor, initialize
from ring_sp.integrations.huggingface import ChunkedLoss


def errors(run: Run, exactly: Trained) -> tuple[float, float]:
    """How far the loss of the first step is from one process's, and its gradients from those."""
    start()
    model = ChunkedLoss(model_of(run), 5)
    manager = groups(ring=run.ring)
    engine, *_ = initialize(
        model=model, optimizer=sgd(model), config=run.host_config(2), manager=manager
    )
    part = engine.ring.batch(batch(run.case, manager.rank("data")))
    loss = engine(part.shift_labels, gradient_divisor(engine), **part.inputs)
    engine.backward(loss)
    found = {
        name.removeprefix("model."): safe_get_full_grad(x).clone()
        for name, x in model.named_parameters()
    }
    destroy(engine)
    return abs(loss.item() / exactly.losses[0] - 1), apart(found, exactly.gradients)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_it_trains_as_one_process(world: Callable[[int], World], stage: int) -> None:
    run = Run("Gemma2", stage)
    exactly, roughly = (one_process(run, 2, 1, x) for x in (torch.float64, torch.float32))
    rounding = apart(roughly.gradients, exactly.gradients)
    for loss, gradients in world(4).run(errors, run, exactly):
        assert loss < 1e-5 and gradients < max(1e-5, 4 * rounding)
