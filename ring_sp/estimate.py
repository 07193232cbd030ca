"""What a choice costs: bytes and seconds by part, and MFU."""

from dataclasses import dataclass
from functools import cached_property

from ring_sp import step_memory, step_time
from ring_sp.explanation import Explanation
from ring_sp.job import Choice, Job, explained, refuse
from ring_sp.step_time import Link, Pass


@dataclass(frozen=True)
class Estimate:
    """What one choice costs: bytes and seconds by part, on the busiest rank."""

    job: Job
    choice: Choice
    memory: dict[str, float]
    times: dict[str, float]
    attention: tuple[Pass, Pass]
    told: Explanation

    @property
    def peak_bytes(self) -> float:
        return step_memory.peak(self.memory)

    @property
    def usable_bytes(self) -> float:
        """Of a GPU's memory."""
        return self.job.hardware.memory_bytes * (1 - step_memory.RESERVE)

    @property
    def host_bytes(self) -> float:
        """Of the host's memory, for one GPU."""
        return step_memory.offloaded(self.job, self.choice, self.told)

    @property
    def offloading(self) -> tuple[Link, ...]:
        """What goes to the host's memory and comes back."""
        return step_time.offloading(self.job, self.choice, self.told)

    @property
    def missing_bytes(self) -> float:
        """By which it does not fit, on the GPU or in its host's memory; 0 if it fits."""
        return max(0.0, *self._missing)

    @property
    def missing_on_host(self) -> bool:
        """Whether `missing_bytes` are the host's, where checkpoints are offloaded."""
        gpu, host = self._missing
        return host > max(0.0, gpu)

    @property
    def _missing(self) -> tuple[float, float]:
        """Bytes over those of the GPU and over those of its host; below 0 if there are enough."""
        host = self.host_bytes - self.job.hardware.host_memory_bytes
        return self.peak_bytes - self.usable_bytes, host

    @property
    def fits(self) -> bool:
        return not self.missing_bytes

    @cached_property
    def seconds(self) -> float:
        """Of a step."""
        return sum(self.times.values())

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs together."""
        return self.job.batch * self.job.seq_len / self.seconds

    @property
    def flops(self) -> int:
        """Of a step of all GPUs, nothing counted twice."""
        job, pairs = self.job, sum(load.pairs for load in self.told.loads)
        pairs //= self.choice.ulysses  # Peers see the same pairs in other heads.
        return job.batch * job.model.flops(job.seq_len, pairs)

    @property
    def mfu(self) -> float:
        """Share of the GPUs' peak FLOP/s, no recomputed FLOPs counted (arXiv:2204.02311, appendix
        B).
        """
        return self.flops / self.seconds / self.job.gpus / self.job.hardware.peak_flops


def estimate(job: Job, choice: Choice) -> Estimate:
    """What a choice costs. Raises ValueError for one that the job cannot have."""
    reason = refuse(job, choice)
    if reason is not None:
        raise ValueError(f"{choice} is no way to spread {job.gpus} GPUs: {reason}")
    told = explained(job, choice)
    return Estimate(
        job,
        choice,
        step_memory.memory(job, choice, told),
        step_time.times(job, choice, told),
        step_time.passes(job, choice, told),
        told,
    )
