"""By how much an engine divides gradients, which differs between ZeRO stages."""

from typing import Any

import torch.distributed as dist

WEIGHTS = 3
"""The ZeRO stage that partitions weights."""


def gradient_divisor(engine: Any) -> int:
    """By what `engine` divides the sum of gradients over all its data and sequence ranks and the
    micro-batches of a step: `averaged_over` of `ring_sp.loss.token_mean`, before each backward.

    Without an mpu this is ranks x accumulation steps in every stage. With an mpu that knows of
    sequence ranks DeepSpeed 0.19 sums over these and averages over data ranks alone, except in
    ZeRO-3 with reduce_scatter (its default), where it averages over all. For
    `engine.backward(loss)` or `loss.backward()`, not for `backward(..., scale_wrt_gas=False)`.
    Raises NotImplementedError for gradient_allreduce_op "sum", and where an engine divides
    parameters differently.
    """
    if not engine.gradient_average:
        raise NotImplementedError(
            'gradient_allreduce_op "sum" is not averaged in all stages; leave it out'
        )
    ranks = dist.get_world_size(engine.seq_data_parallel_group)
    if engine.sequence_parallel_size > 1 and not _averages_all(engine):
        ranks //= engine.sequence_parallel_size
    steps: int = engine.gradient_accumulation_steps()
    return ranks * steps


def _averages_all(engine: Any) -> bool:
    """Whether an engine with an mpu divides by sequence ranks too."""
    if engine.zero_optimization_stage() != WEIGHTS:
        return False
    if engine.zero_reduce_scatter() or not engine.zero_contiguous_gradients():
        return True
    bucket = engine.zero_reduce_bucket_size()
    for name, weight in engine.module.named_parameters():
        if weight.ds_numel > bucket:
            raise NotImplementedError(
                f"ZeRO-3 with reduce_scatter false divides {name} by another number than the rest: "
                f"it has {weight.ds_numel} elements and reduce_bucket_size is {bucket}. Raise the "
                f"latter, or set reduce_scatter true."
            )
    return False
