"""What the ring is measured against, and the clock."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from ring_sp import masks

Step = Callable[[], object]


class _HostEvent:
    """The part of torch.cuda.Event that the clock needs, where there is no GPU."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: "_HostEvent") -> float:
        return (other.at - self.at) * 1e3


def start() -> torch.device:
    """torch.distributed, with a GPU for each rank if there are any."""
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def event(device: torch.device) -> Any:
    return torch.cuda.Event(enable_timing=True) if device.type == "cuda" else _HostEvent()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def peak_bytes(step: Step, device: torch.device) -> int:
    """Most bytes allocated during a step, its inputs included."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def drawn(
    heads: tuple[int, ...], length: int, head_dim: int, device: torch.device
) -> tuple[Tensor, ...]:
    """Random [1, length, heads, head_dim] in bf16, for each number of heads."""
    make = torch.Generator(device).manual_seed(dist.get_rank())
    return tuple(
        torch.randn(1, length, n, head_dim, generator=make, device=device, dtype=torch.bfloat16)
        for n in heads
    )


def _whole(case: Any, head_dim: int, device: torch.device) -> tuple[Tensor, ...]:
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    return drawn(heads, case.seq_len, head_dim, device)


def flash4(case: Any, head_dim: int, device: torch.device) -> Step:
    """flash-attn-4 called directly on the whole problem."""
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    q, k, v, dout = _whole(case, head_dim, device)
    options: dict[str, Any] = {"causal": True}
    if case.mask == masks.full():
        options = {}
    elif case.mask.name == "sliding_window":
        options = {"window_size_left": case.mask.args[0], "window_size_right": 0}
    elif case.mask.name == "documents":
        cuts = torch.tensor(case.mask.args[0], dtype=torch.int32, device=device)
        longest = int((cuts[1:] - cuts[:-1]).max())
        for name in "qk":
            options |= {f"cu_seqlens_{name}": cuts, f"max_seqlen_{name}": longest}
        q, k, v, dout = (x.flatten(0, 1) for x in (q, k, v, dout))

    def step() -> object:
        out, lse, *_ = _flash_attn_fwd(q, k, v, return_lse=True, **options)
        return _flash_attn_bwd(q, k, v, out, dout, lse, **options)

    return step


def cudnn(case: Any, head_dim: int, device: torch.device) -> Step:
    """cuDNN through torch on the whole problem, key heads expanded to the query heads."""
    if case.mask not in (masks.causal(), masks.full()):
        raise ValueError("causal or full only")
    q, k, v, dout = (x.transpose(1, 2) for x in _whole(case, head_dim, device))
    causal, scale = case.mask == masks.causal(), head_dim**-0.5
    forward = torch.ops.aten._scaled_dot_product_cudnn_attention
    backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
    k, v = (x.repeat_interleave(case.heads // case.kv_heads, 1) for x in (k, v))

    def step() -> object:
        out, lse, cq, ck, mq, mk, seed, offset, _ = forward(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )
        return backward(
            dout, q, k, v, out, lse, seed, offset, None, cq, ck, mq, mk, 0.0, causal, scale=scale
        )

    return step


def context_parallel(case: Any, head_dim: int, device: torch.device) -> Step:
    """torch's context parallelism over cuDNN; it wants as many key heads as query heads."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel as parallel
    from torch.nn.attention import SDPBackend, sdpa_kernel

    size = dist.get_world_size()
    mesh = init_device_mesh(device.type, (size,))
    q, k, v, dout = (
        x.transpose(1, 2).contiguous()
        for x in drawn((case.heads,) * 4, case.seq_len // size, head_dim, device)
    )
    trained = [x.requires_grad_() for x in (q, k, v)]
    causal = case.mask == masks.causal()

    def step() -> object:
        # The tensors are this rank's already: the buffer only starts the context.
        buffer = torch.empty(case.seq_len, device=device)
        with (
            sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
            parallel(mesh, buffers=[buffer], buffer_seq_dims=[0], no_restore_buffers={buffer}),
        ):
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
            return torch.autograd.grad(out, trained, dout)

    return step


SINGLE: dict[str, Callable[[Any, int, torch.device], Step]] = {"flash4": flash4, "cudnn": cudnn}


def trace(step: Step, folder: Path, name: str, device: torch.device) -> None:
    """A profiler trace of two steps on each rank, for chrome://tracing or `picture.py`."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(3):
        step()
    dist.barrier()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        step()
        synchronize(device)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{name} rank {dist.get_rank()}".replace(" ", "_")
    profiler.export_chrome_trace(str(folder / f"{name}.json"))
