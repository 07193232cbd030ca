"""The experiments on CPUs: the planner's bytes against bytes counted at full size, and each script
from end to end with a small model.
"""

from typing import Any
from unittest import mock

import pytest
import torch
from counted import Counted
from step import Clock, Form, Training
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ring_sp import Topology, hardware, linear_loss, model_shape
from ring_sp.estimate import Estimate, estimate
from ring_sp.job import Choice, Job
from ring_sp.step_memory import kernel_work
from ring_sp.step_time import weights_again

K = 1 << 10
FORMS: dict[str, dict[str, Any]] = {
    "all is kept": {},
    "feed-forward by chunks": {"ff_chunk": 4 * K},
    "attention kept": {"checkpoint": "selective"},
    "attention not kept": {"checkpoint": "full"},
    "every 2 layers": {"checkpoint": "full", "every": 2},
    "every 2 layers, attention kept": {"checkpoint": "selective", "every": 2},
    "as the paper": {"checkpoint": "full", "ff_chunk": 4 * K},
    "attention kept, chunks": {"checkpoint": "selective", "ff_chunk": 4 * K},
    "every 4 layers, chunks": {"checkpoint": "selective", "every": 4, "ff_chunk": 4 * K},
    "offloaded": {"checkpoint": "selective", "ff_chunk": 4 * K, "offload": True},
    "offloaded, without attention": {"checkpoint": "full", "offload": True},
}


def expected(model: str, tokens: int, **choice: Any) -> Estimate:
    job = Job(model_shape.find(model), hardware.find("h200"), 1, tokens)
    return estimate(job, Choice(**{"loss_chunk": 8 * K} | choice))


def counted_peak(found: Estimate) -> int:
    """Bytes of a step's forward and backward, of tensors with the sizes of the real ones and no
    content; what is inside of attention's kernel is the planner's own number.
    """
    tokens = found.job.seq_len
    inside = {"ring_sp::attention_backward": lambda *_: kernel_work(found.job.model) * tokens}
    product = linear_loss._product

    def as_on_cuda(*args: Any) -> torch.Tensor:
        with counted.paused():  # CPUs have no bf16 product with a float32 result, and make copies.
            out = product(*args)
        return counted.add(out)

    with (
        FakeTensorMode(),
        Counted(inside) as counted,
        mock.patch.object(linear_loss, "_product", as_on_cuda),
    ):
        device = torch.device("cpu")
        training = Training(Form(found.job.model, found.choice), Topology(), device, counted)
        counted.reset_peak()
        training.differentiate(tokens, 0, Clock(device))
    return counted.peak


@pytest.mark.parametrize("form", FORMS)
def test_bytes_are_those_of_each_form_counted_at_full_size(form: str) -> None:
    found = expected("llama-1b:layers=8", 64 * K, **FORMS[form])
    # Of what goes to the host all may have arrived when the loss begins.
    near = 0.03 if found.choice.offload else 0.005
    assert found.peak_bytes == pytest.approx(counted_peak(found), rel=near)


@pytest.mark.parametrize("form", FORMS)
def test_products_are_run_again_as_often_as_expected(form: str) -> None:
    sizes = "layers=4,hidden=64,heads=4,kv_heads=2,head_dim=16,ffn=256,vocab=128"
    chosen = FORMS[form] | ({"ff_chunk": 4} if "ff_chunk" in FORMS[form] else {})
    found, tokens = expected(f"llama-1b:{sizes}", 256, **chosen), 256
    model, device = found.job.model, torch.device("cpu")
    training = Training(Form(model, found.choice), Topology(), device)
    with FlopCounterMode(display=False) as counter:
        training.differentiate(tokens, 0, Clock(device))
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for kind, count in counts.items() if "mm" in str(kind))
    again = weights_again(model, found.choice) * model.layers
    # Of a checkpoint the last chunk is not run: one of 64.
    assert products == pytest.approx((6 * model.product_weights + 2 * again) * tokens, rel=0.005)


@pytest.mark.parametrize("form", ["attention kept", "every 2 layers"])
def test_bytes_of_other_shapes(form: str) -> None:
    for model in ("qwen3-0.6b:layers=6", "llama-8b:layers=4"):
        found = expected(model, 32 * K, loss_chunk=2 * K, **FORMS[form])
        assert found.peak_bytes == pytest.approx(counted_peak(found), rel=0.005)
