"""A norm of plain torch under tensor-sequence parallelism, for machines without Transformer Engine
and apex.
"""

from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

NORMS = {"LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm}


class TensorSequenceNorm:
    """Takes the place of Megatron's WrappedTorchNorm, which refuses tensor-sequence parallelism.

    Makes a torch LayerNorm or RMSNorm whose weights are marked `sequence_parallel`, so that
    Megatron sums their gradients over the tensor ranks, each of which normalises tokens of its own.
    `persist_layer_norm` only chooses among apex's kernels and is ignored.
    """

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> nn.Module:
        """Raises NotImplementedError for what torch's norms do not have."""
        unsupported = {
            f"normalization {config.normalization!r}": config.normalization not in NORMS,
            "layernorm_zero_centered_gamma": config.layernorm_zero_centered_gamma,
            "memory_efficient_layer_norm": config.memory_efficient_layer_norm,
        }
        found = [name for name, present in unsupported.items() if present]
        if found:
            raise NotImplementedError(
                f"torch's norms have no {'; no '.join(found)}; install Transformer Engine or "
                f"NVIDIA's apex"
            )
        norm = NORMS[config.normalization](hidden_size, eps=eps)
        for weight in norm.parameters():
            weight.sequence_parallel = config.sequence_parallel
        return norm
