"""What the planner says of requests that cannot be met, and of files that are wrong."""

from dataclasses import replace
from typing import Any

import pytest
from test_planner import H200, MEASURED_MODEL, job

from ring_sp import hardware, model_shape
from ring_sp.planner import plan

altered: Any = replace
"""To values of other types."""


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: model_shape.find("llama-9b"), "one of llama-1b, .*gpt-1t, or a .json"),
        (lambda: hardware.find("h300"), "one of a100, b200, h100, h200, tpu-v3, .* got h300"),
        (lambda: job(gpus=0), "gpus must be at least 1; got 0"),
        (lambda: plan(job(), tensor=3), "no way to spread 8 GPUs .*do not make 8 GPUs"),
        (lambda: plan(job(), ulysses=64), "do not make 8 GPUs.* Leave out"),
        (lambda: plan(job(), tensor=16), ": {'tensor': 16} do not make 8 GPUs. Leave out"),
        (lambda: plan(job(gpus=6), ring=4), ": {'ring': 4} do not make 6 GPUs. Leave out"),
        (lambda: plan(job(gpus=64), ulysses=64), "ulysses 64 must divide 32 heads"),
        (lambda: plan(job(), checkpoint="some"), "one of none, selective, full; got 'some'"),
        (lambda: plan(job(), ff_chunk=-1), "ff_chunk must be at least 1; got -1"),
        (lambda: plan(job(), ring=None), "ring must be a whole number; got None"),
        (lambda: plan(job(), ff_chunk="4k"), "ff_chunk must be a whole number; got '4k'"),
        (lambda: plan(job(gpus=32), exchange="copies"), "copies need .* in one host of 8"),
        (lambda: plan(job(), rings=2), "got \\['rings'\\]"),
        (lambda: replace(H200, link_rate=0), "link_rate must be a number above 0; got 0"),
        (lambda: replace(H200, peak_flops=float("inf")), "must be a number above 0; got inf"),
        (lambda: altered(H200, gpus_per_host=2.5), "gpus_per_host must be a whole number; got 2.5"),
        (lambda: altered(H200, head_dim_rates=(("64", 1, 1),)), "must be a number .*; got '64'"),
        (lambda: altered(MEASURED_MODEL, gated="false"), "must be true or false; got 'false'"),
        (lambda: replace(MEASURED_MODEL, layers=True), "layers must be a whole number .* got True"),
        (lambda: replace(MEASURED_MODEL, kv_heads=5), "kv_heads must divide 16 heads; got 5"),
    ],
)
def test_mistakes_are_named(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
