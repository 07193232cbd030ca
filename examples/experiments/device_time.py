"""Device seconds of a step by kind of kernel, from torch's profiler."""

from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

KINDS = {
    "transfers": ("nccl", "sendrecv"),
    "attention backward": ("bwd", "fold_gradient", "delta", "attention_backward"),
    "attention forward": ("flash", "fmha", "fwd", "fold_kernel"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk"),
    "optimizer": ("adam", "multi_tensor"),
    "host copies": ("memcpy dtoh", "memcpy htod"),
}
"""Words in a kernel's name, the first kind that has one counts; all else is element-wise."""


def by_kind(step: Callable[[], object]) -> dict[str, float]:
    """Run a step and add up its kernels, which may have run beside each other."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    found = dict.fromkeys([*KINDS, "element-wise"], 0.0)
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA:
            found[kind(event.name)] += event.time_range.elapsed_us() / 1e6
    return found


def kind(name: str) -> str:
    """Of a kernel."""
    lowered = name.lower()
    words = (each for each, known in KINDS.items() if any(word in lowered for word in known))
    return next(words, "element-wise")
