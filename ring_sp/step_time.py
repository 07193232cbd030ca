"""Seconds of a training step, by part: FLOPs and bytes over a machine's rates.

What is fitted, on 2 H200 (examples/megatron/RESULTS.md, examples/benchmarks/RESULTS.md): the
constants of this module. All else is counted.
"""

from dataclasses import dataclass

from ring_sp.explanation import Explanation
from ring_sp.job import Choice, Job
from ring_sp.model_shape import ModelShape
from ring_sp.step_memory import GRADIENT, WEIGHT

VISIT_SECONDS = 1e-4
"""Of each visit in a forward or a backward, beside its work: launches, and ranks that wait for
each other.
"""
OWN_BYTES, VISIT_BYTES = 20, 80
"""Memory traffic of attention's forward and backward for each element of q: delta, float32 sums
and their conversion; and for each visit after the first, folding its part into the results.
"""
FORWARD_SHARE = 0.35
"""Of that traffic, and of what is element-wise."""
SMALL_HEAD_SHARE = 0.87
"""Rates of attention with head dim 64 or less, as a share of those with 128 (one H200, 16k)."""
LAYER_SHARE = 0.9
"""Rate of a layer's matrix products as a share of those of 8192^3."""
LOSS_BYTES = 64
"""Memory traffic of an unfused float32 cross entropy for each logit, both ways."""
WEIGHT_BYTES, STATE_BYTES = 22, 98
"""Memory traffic of an optimizer's step: for each weight, summing its gradient, scaling and zeroing
it; for each weight whose states a rank has, norm, clipping, torch's Adam and the cast to bf16.
"""


@dataclass(frozen=True)
class Link:
    """Transfers of one kind in a pass over a layer's attention."""

    name: str
    count: float
    num_bytes: float
    rate: float
    """bytes/s"""
    cover: float
    """Seconds of attention under which each of them runs."""

    @property
    def seconds(self) -> float:
        return self.num_bytes / self.rate

    @property
    def exposed(self) -> float:
        """Seconds of all of them that attention does not hide."""
        return self.count * max(0.0, self.seconds - self.cover)


@dataclass(frozen=True)
class Pass:
    """Attention of one layer and one sequence, forward or backward, on the busiest rank."""

    seconds: float
    """Without waiting for transfers."""
    links: tuple[Link, ...]
    alone: float
    """Seconds of transfers that nothing hides: Ulysses' and the last sums on their way home."""

    @property
    def exposed(self) -> float:
        return sum(link.exposed for link in self.links) + self.alone


def passes(job: Job, choice: Choice, told: Explanation) -> tuple[Pass, Pass]:
    """The forward and the backward of a layer's attention."""
    load = max(told.loads, key=lambda load: load.pairs)
    model, hardware = job.model, job.hardware
    hops = max(load.visits for load in told.loads) - 1
    small = SMALL_HEAD_SHARE if model.head_dim <= 64 else 1.0
    width, reach = told.heads * model.head_dim, choice.tensor * choice.ulysses
    elements = load.tokens * choice.ulysses * width
    traffic = elements * (OWN_BYTES + VISIT_BYTES * hops) / hardware.copy_rate
    heads_rate, found = hardware.reach(reach), []
    for forward in (True, False):
        rate = small * (hardware.forward_rate if forward else hardware.backward_rate)
        work = (4 if forward else 10) * width * load.pairs / rate
        work += traffic * (FORWARD_SHARE if forward else 1 - FORWARD_SHARE)
        work += VISIT_SECONDS * (hops + 1)
        sent = load.forward_kv if forward else load.backward_data + load.backward_sums
        heads = load.forward_heads if forward else load.backward_heads
        links = _links(job, choice, sent / max(hops, 1), work / (hops + 1), hops)
        home = 0 if forward else load.backward_sums / max(hops, 1) / links[-1].rate if links else 0
        found.append(Pass(work, links, heads / heads_rate + home))
    return found[0], found[1]


def _links(job: Job, choice: Choice, num_bytes: float, visit: float, hops: int) -> tuple[Link, ...]:
    """The hops of the inner ring, each under a visit, and of the outer, each under a whole inner
    ring.
    """
    if choice.stations == 1:
        return ()
    reach, made = choice.tensor * choice.ulysses, hops / (choice.stations - 1)
    kinds = (
        ("ring", choice.outer * (choice.ring - 1), reach * choice.ring, visit),
        ("outer", choice.outer - 1, reach * choice.stations, visit * choice.ring),
    )
    return tuple(
        Link(name, count * made, num_bytes, job.hardware.reach(span), cover)
        for name, count, span, cover in kinds
        if count
    )


def element_wise_bytes(model: ModelShape) -> int:
    """Memory traffic for each token of a layer, forward and backward: two norms (14 bytes an
    element each), two residual sums (12 each), rotary embeddings of q and k unfused (36), splitting
    and joining q, k and v (8), the feed-forward's activation (16 where gated, else 10).
    """
    rotated = (model.heads + model.kv_heads) * model.head_dim
    split = (model.heads + 2 * model.kv_heads) * model.head_dim
    return 52 * model.hidden + 36 * rotated + 8 * split + (16 if model.gated else 10) * model.ffn


def times(job: Job, choice: Choice, told: Explanation) -> dict[str, float]:
    """Seconds of a step by part; their sum is the step."""
    model, hardware = job.model, job.hardware
    forward, backward = passes(job, choice, told)
    layers = model.layers * (job.batch // choice.data)
    tokens = max(load.tokens for load in told.loads) * job.batch // choice.data
    of_tensor = tokens / choice.tensor
    products_rate = hardware.matmul_rate * LAYER_SHARE
    layer_bytes = element_wise_bytes(model)
    element_wise = model.layers * layer_bytes + LOSS_BYTES * model.vocab
    again, again_exposed = _again(model, choice)
    products = 6 * model.product_weights * of_tensor / products_rate
    around_ring = choice.checkpoint == "full"
    recomputed = (
        2 * model.layers * again * of_tensor / products_rate
        + (choice.checkpoint != "none")
        * (FORWARD_SHARE * model.layers * layer_bytes * of_tensor / hardware.copy_rate)
        + around_ring * layers * forward.seconds
    )
    exposed = layers * (forward.exposed * (1 + around_ring) + backward.exposed)
    exposed += _tensor_seconds(job, choice, tokens) * (1 + again_exposed)
    hidden = products + layers * (forward.seconds + backward.seconds)
    return {
        "attention forward": layers * forward.seconds,
        "attention backward": layers * backward.seconds,
        "matrix products": products,
        "element-wise": element_wise * of_tensor / hardware.copy_rate,
        "recomputation": recomputed,
        "exposed communication": exposed + _sync_seconds(job, choice, hidden),
        "optimizer": _optimizer_seconds(job, choice),
    }


def _again(model: ModelShape, choice: Choice) -> tuple[int, float]:
    """Weights of a layer whose products are computed again (the feed-forward's twice where chunks
    lie in a checkpoint), and the share of its tensor-parallel transfers made again.
    """
    layer = 0 if choice.checkpoint == "none" else model.layer_weights
    ffn = model.ffn_weights if choice.ff_chunk else 0
    return layer + ffn, 0.4 if layer else 0.2 if ffn else 0.0


def _tensor_seconds(job: Job, choice: Choice, tokens: int) -> float:
    """Gathers and scatters of tensor-sequence parallelism: four in a layer's forward and six in its
    backward, none of them hidden (arXiv:2205.05198 section 4).
    """
    size, model = choice.tensor, job.model
    num_bytes = 2 * model.hidden * tokens * (size - 1) / size
    return 10 * model.layers * num_bytes / job.hardware.reach(size)


def _sync_seconds(job: Job, choice: Choice, hidden: float) -> float:
    """Gradients summed and weights gathered among the ranks that share them, once a step and not
    hidden; FSDP gathers twice and hides it behind `hidden` seconds of work.
    """
    size, hardware = choice.sharing, job.hardware
    each = job.model.weights / choice.tensor * (size - 1) / size
    rate = hardware.link_rate
    if choice.tensor * size > hardware.gpus_per_host:
        # Every GPU of a host has a network port, and a rank's share of them is its own host's.
        rate = min(rate, hardware.network_rate * max(1, hardware.gpus_per_host // choice.tensor))
    if choice.shard == "optimizer":
        return (GRADIENT + WEIGHT) * each / rate
    return max(0.0, (GRADIENT + 2 * WEIGHT) * each / rate - hidden)


def _optimizer_seconds(job: Job, choice: Choice) -> float:
    own = job.model.weights / choice.tensor
    held = own if choice.shard == "optimizer" else own / choice.sharing
    traffic = WEIGHT_BYTES * held + STATE_BYTES * own / choice.sharing
    return traffic / job.hardware.copy_rate
