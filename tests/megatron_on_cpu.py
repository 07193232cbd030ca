"""Megatron on machines without a GPU, for the tests alone."""

from typing import Any

import torch
from megatron.core.tensor_parallel import random
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils
from torch.overrides import TorchFunctionMode


class Stream:
    """A stream of a GPU that is not there."""

    def wait_stream(self, other: object) -> None:
        """What was to be waited for is done."""


class OnCpu(TorchFunctionMode):
    """What Megatron puts on a GPU by name goes to the CPU."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.Tensor.cuda:
            return args[0]
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
