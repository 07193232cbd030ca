"""The groups of a ring as the `mpu` that DeepSpeed asks."""

import torch.distributed as dist
from torch.distributed import ProcessGroup

from ring_sp.topology import ProcessGroupManager


class RingMPU:
    """An `mpu` for `deepspeed.initialize`, for those who say groups in code, as Megatron-DeepSpeed.

    Batches and samplers count data ranks; gradients, optimizer states and weights spread over data
    and sequence ranks together. Scale the loss with `gradient_divisor(engine)`. The method names
    are DeepSpeed's protocol.
    """

    def __init__(self, manager: ProcessGroupManager) -> None:
        """`manager` is of `ProcessGroupManager.build`, over a world with torch.distributed.

        Raises ValueError for a manager of another kind, NotImplementedError for pipelines, which
        DeepSpeed divides by itself.
        """
        if manager.mesh is None:
            raise ValueError(
                "RingMPU needs the groups of a world: ProcessGroupManager.build(ring=...) once "
                "torch.distributed is initialized"
            )
        if manager.size("pipeline") > 1:
            raise NotImplementedError(
                f"DeepSpeed takes no mpu with pipelines; got {manager.size('pipeline')} stages"
            )
        self.manager = manager

    def get_sequence_parallel_group(self) -> ProcessGroup | None:
        return self.manager.group("sequence")

    def get_sequence_parallel_world_size(self) -> int:
        return self.manager.size("sequence")

    def get_sequence_parallel_rank(self) -> int:
        return self.manager.rank("sequence")

    def get_sequence_data_parallel_group(self) -> ProcessGroup | None:
        return self.manager.group("data_sequence")

    def get_sequence_data_parallel_world_size(self) -> int:
        return self.manager.size("data_sequence")

    def get_sequence_data_parallel_rank(self) -> int:
        return self.manager.rank("data_sequence")

    def get_data_parallel_group(self) -> ProcessGroup | None:
        """Data and sequence ranks: ZeRO-3 partitions weights over this group, and reduces over
        that of `get_sequence_data_parallel_group`.
        """
        return self.manager.group("data_sequence")

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.manager.group("data_sequence"))

    def get_data_parallel_world_size(self) -> int:
        """Data ranks alone, by which batches are counted and sampled."""
        return self.manager.size("data")

    def get_data_parallel_rank(self) -> int:
        return self.manager.rank("data")

    def get_model_parallel_group(self) -> ProcessGroup | None:
        return self.manager.group("tensor")

    def get_model_parallel_world_size(self) -> int:
        return self.manager.size("tensor")

    def get_model_parallel_rank(self) -> int:
        return self.manager.rank("tensor")

    def get_tensor_model_parallel_group(self) -> ProcessGroup | None:
        return self.manager.group("tensor")

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.manager.size("tensor")

    def get_tensor_model_parallel_rank(self) -> int:
        return self.manager.rank("tensor")

    def get_pipeline_model_parallel_group(self) -> ProcessGroup | None:
        return self.manager.group("pipeline")

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self.manager.size("pipeline")

    def get_pipeline_model_parallel_rank(self) -> int:
        return self.manager.rank("pipeline")
