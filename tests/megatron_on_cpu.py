"""Megatron on machines without a GPU, for the tests alone."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed.fsdp import mcore_fsdp_adapter
from megatron.core.distributed.fsdp.src.megatron_fsdp import param_and_grad_buffer
from megatron.core.tensor_parallel import random
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode


class Stream:
    """A stream of a GPU that is not there."""

    def wait_stream(self, other: object) -> None:
        """What was to be waited for is done."""

    def record_event(self, event: "Event | None" = None) -> "Event":
        return event or Event()

    def wait_event(self, event: "Event") -> None:
        """What was to be waited for is done."""


class Event:
    """What happened on such a stream."""

    def __init__(self, **_: bool) -> None:
        """It has happened."""

    def record(self, stream: Stream | None = None) -> None:
        """It has happened."""

    def wait(self, stream: Stream | None = None) -> None:
        """It has happened."""

    synchronize = wait


class Mesh:
    """Takes the place of a DeviceMesh of GPUs."""

    @staticmethod
    def from_group(groups: list[dist.ProcessGroup], device_type: str, **given: Any) -> Any:
        return dist.DeviceMesh.from_group(groups, device_type.replace("cuda", "cpu"), **given)


@contextmanager
def finished(group: dist.ProcessGroup, **_: bool) -> Iterator[Event]:
    """Collectives that are over where Megatron only starts them: a process may die of gloo where
    tensors are dropped while they are under way.
    """
    with dist._coalescing_manager(group):
        yield Event()


class OnCpu(TorchFunctionMode):
    """What Megatron puts on a GPU by name goes to the CPU."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.Tensor.type and len(args) == 1 and isinstance(args[0], DTensor):
            return args[0].to_local().type().replace("torch.", "torch.cuda.")
        given = dict(kwargs or {})
        given.pop("pin_memory", None)
        if str(given.get("device", "")).startswith("cuda"):
            given["device"] = "cpu"
        result = function(*args, **given)
        if function is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.")
        return result


def pretend_there_is_a_gpu() -> None:
    """Megatron makes some of its buffers on the current CUDA device, and 0.16 believes in
    parts of Transformer Engine that are not there.
    """
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
        multi_latent_attention.HAVE_TE = False
    torch.cuda.current_stream = lambda *_: Stream()  # type: ignore[assignment]
    torch.cuda.synchronize = lambda *_: None
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]


def pretend_gpus_for_fsdp() -> None:
    """Megatron-FSDP makes meshes of GPUs, and works on streams of its own."""
    torch.cuda.Stream, torch.cuda.Event = Stream, Event  # type: ignore[assignment, misc]
    torch.cuda.stream = lambda _: nullcontext()  # type: ignore[assignment, return-value]
    torch.cuda.current_device = lambda: 0
    mcore_fsdp_adapter.DeviceMesh = Mesh
    param_and_grad_buffer._coalescing_manager = finished
    # Megatron's own wants einops; without pipeline and expert ranks it is this.
    mcore_fsdp_adapter._get_dp_tp_mesh = lambda data, tensor, **_: torch.arange(
        dist.get_world_size()
    ).view(data.size(), tensor.size())
