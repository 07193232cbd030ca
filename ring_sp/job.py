"""What a planner plans: a training step of a model on some GPUs, and how it is spread over them."""

from dataclasses import dataclass
from functools import cache
from math import prod

import torch

from ring_sp.exchanges import gathered
from ring_sp.explanation import Explanation, explain
from ring_sp.hardware import Hardware
from ring_sp.layout import whole_number
from ring_sp.model_shape import ModelShape
from ring_sp.ring import Axis
from ring_sp.sequence import ShardedSequence
from ring_sp.topology import Topology

CHECKPOINTS = ("none", "selective", "full")
"""What a layer keeps for backward: everything; its input and attention's result, so that
recomputation does not go round the ring; its input.
"""
SHARDS = ("optimizer", "all")
"""What the ranks of data and sequence divide among them: the optimizer's states (Megatron's
distributed optimizer, ZeRO 1), or gradients and weights too (FSDP, ZeRO 3).
"""


@dataclass(frozen=True)
class Job:
    """A step of `batch` causal sequences of `seq_len` tokens on `gpus` GPUs, in bf16 with gradients
    in float32 and Adam. Raises ValueError for numbers below 1.
    """

    model: ModelShape
    hardware: Hardware
    gpus: int
    seq_len: int
    batch: int = 1

    def __post_init__(self) -> None:
        for name in ("gpus", "seq_len", "batch"):
            if whole_number(name, getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")

    def in_host(self, span: int) -> bool:
        """Whether groups that span `span` GPUs, one after another in rank order, each lie in one
        host.
        """
        host = self.hardware.gpus_per_host
        return self.gpus <= host or host % span == 0

    def reach(self, span: int) -> float:
        """Achieved bytes/s between the ranks of such groups, on the worst placed of them."""
        return self.hardware.link_rate if self.in_host(span) else self.hardware.network_rate


@dataclass(frozen=True)
class Choice:
    """How a job is spread over its GPUs and what its layers keep."""

    tensor: int = 1
    data: int = 1
    outer: int = 1
    ring: int = 1
    ulysses: int = 1
    layout: str = "zigzag"
    exchange: str = "messages"
    checkpoint: str = "none"
    ff_chunk: int | None = None
    """Tokens of a chunk of the feed-forward (arXiv:2305.19370); None for all at once."""
    loss_chunk: int | None = None
    """Tokens of a chunk of the logits; None for all at once."""
    shard: str = "optimizer"
    every: int = 1
    """Layers of a checkpoint, which keeps the input of the first of them."""
    offload: bool = False
    """Whether what checkpoints keep lies in the host's memory until it is wanted."""

    @property
    def sequence(self) -> int:
        """Ranks that share a sequence, those of tensor parallelism apart."""
        return self.outer * self.ring * self.ulysses

    @property
    def stations(self) -> int:
        """Of the ring, outer and inner."""
        return self.outer * self.ring

    @property
    def sharing(self) -> int:
        """Ranks with the same weights: over these gradients are summed and states divided."""
        return self.data * self.sequence


def refuse(job: Job, choice: Choice) -> str | None:
    """Why a choice is none for a job, whatever its memory; None if it is one."""
    model = job.model
    sizes = {"tensor": choice.tensor, "data": choice.data, "sequence": choice.sequence}
    heads, kv_heads = model.heads // choice.tensor, model.kv_heads // choice.tensor
    needs = (
        (prod(sizes.values()) == job.gpus, f"{sizes} do not make {job.gpus} GPUs"),
        (job.batch % choice.data == 0, f"data {choice.data} does not divide batch {job.batch}"),
        (
            heads * choice.tensor == model.heads and kv_heads * choice.tensor == model.kv_heads,
            f"tensor {choice.tensor} must divide {model.heads} heads and {model.kv_heads} of keys",
        ),
        (
            choice.tensor <= job.hardware.gpus_per_host,
            f"tensor {choice.tensor} is more than the {job.hardware.gpus_per_host} GPUs of a host",
        ),
        (heads % choice.ulysses == 0, f"ulysses {choice.ulysses} must divide {heads} heads"),
        (
            job.seq_len >= choice.sequence,
            f"{choice.sequence} ranks of sequence need as many tokens",
        ),
        (
            choice.exchange != "copies"
            or choice.stations == 1
            or job.in_host(choice.tensor * choice.sequence),
            f"copies need all GPUs of a ring in one host of {job.hardware.gpus_per_host}",
        ),
        (
            not choice.exchange.startswith("gather") or min(choice.outer, choice.ring) == 1,
            "a gather is for one ring, not for a ring of rings",
        ),
        (
            choice.checkpoint != "none" or (choice.every == 1 and not choice.offload),
            "every and offload are of checkpoints, and there are none",
        ),
        (choice.every <= model.layers, f"a checkpoint of {choice.every} layers is more than all"),
    )
    return next((reason for met, reason in needs if not met), None)


def explained(job: Job, choice: Choice) -> Explanation:
    """What `explain` says of a layer's attention: work, hops and bytes of each rank for one
    sequence.

    Whether queries or keys go round in backward is that of a kernel that needs no out, as flash4
    and triton.
    """
    model = job.model
    axes = Axis(0, choice.outer), Axis(0, choice.ring), Axis(0, choice.ulysses)
    topology = Topology(*axes, gather=gathered(choice.exchange, choice.stations))
    heads = model.heads // choice.tensor, model.kv_heads // choice.tensor
    return _explained(job.seq_len, topology, choice.layout, heads, model.head_dim)


@cache
def _sequence(seq_len: int, topology: Topology, layout: str) -> ShardedSequence:
    return ShardedSequence(seq_len, topology, layout=layout)


@cache
def _explained(
    seq_len: int, topology: Topology, layout: str, heads: tuple[int, int], head_dim: int
) -> Explanation:
    sequence = _sequence(seq_len, topology, layout)
    q, k = (
        torch.empty(1, sequence.local_len, n, head_dim, dtype=torch.bfloat16, device="meta")
        for n in heads
    )
    # The kernels answer for the machine at hand, which is not the one that is planned for.
    return explain(q, k, k, sequence, kernel="reference", device_type="cpu")
