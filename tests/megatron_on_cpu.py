"""Megatron on machines without a GPU, for the tests alone."""

from typing import Any

import torch
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils
from torch.overrides import TorchFunctionMode


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
        return function(*args, **given)


def pretend_there_is_a_gpu() -> None:
    """Megatron makes some of its buffers on the current CUDA device, and 0.16 believes in
    parts of Transformer Engine that are not there.
    """
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
        multi_latent_attention.HAVE_TE = False
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
