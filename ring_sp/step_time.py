"""Seconds of a training step, by part: FLOPs and bytes over a machine's rates.

What is fitted, on 2 H200 (examples/megatron/RESULTS.md, examples/benchmarks/RESULTS.md): the
constants of this module. All else is counted.
"""

from dataclasses import dataclass

from ring_sp.explanation import Explanation
from ring_sp.job import Choice, Job
from ring_sp.model_shape import ModelShape
from ring_sp.step_memory import GRADIENT, WEIGHT, checkpoint_bytes

FITTED_TO = (
    (
        "Megatron-core steps of 1.03B, 2 H200: 32k tokens on one, 32k and 64k on a ring of 2, and "
        "the last one's peak (examples/megatron/RESULTS.md)"
    ),
    (
        "attention alone of 32:8 and 16:4 heads of 128: one and two H200 at 16k to 128k tokens "
        "(examples/benchmarks/RESULTS.md)"
    ),
    "attention alone on one H200 and on a ring of 2 at 2k tokens, for HOST_SECONDS",
)
"""The runs that the constants of this module come from: against others it predicts."""
VISIT_SECONDS = 1e-4
"""Of each visit in a forward or a backward, beside its work: launches, and ranks that wait for
each other.
"""
HOST_SECONDS = 0.46e-3, 0.71e-3
"""Of a CPU for a visit of a ring in forward and backward: shorter work waits for its launches."""
OWN_BYTES, VISIT_BYTES = 20, 80
"""Memory traffic of attention's forward and backward for each element of q: delta, float32 sums
and their conversion; and for each visit after the first, folding its part into the results.
"""
FORWARD_SHARE = 0.35
"""Of that traffic, and of what is element-wise."""
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
    width, reach = told.heads * model.head_dim, choice.tensor * choice.ulysses
    elements = load.tokens * choice.ulysses * width
    traffic = elements * (OWN_BYTES + VISIT_BYTES * hops) / hardware.copy_rate
    heads_rate, found = job.reach(reach), []
    rates = hardware.attention_rates(model.head_dim)
    for forward, rate, host in zip((True, False), rates, HOST_SECONDS, strict=True):
        work = (4 if forward else 10) * width * load.pairs / rate
        work += traffic * (FORWARD_SHARE if forward else 1 - FORWARD_SHARE)
        work += VISIT_SECONDS * (hops + 1)
        if hops:
            work = max(work, host * (hops + 1))
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
        Link(name, count * made, num_bytes, job.reach(span), cover)
        for name, count, span, cover in kinds
        if count
    )


def element_wise_bytes(model: ModelShape) -> int:
    """Memory traffic for each token of a layer, forward and backward, as `RingTransformer` has it,
    whose every operation is a kernel: two norms (22 bytes an element each), two residual sums (12
    each), rotary embeddings of q and k in float32 (104), splitting and joining q, k and v (8), the
    feed-forward's activation (32 where gated, else 10).
    """
    rotated = (model.heads + model.kv_heads) * model.head_dim
    split = (model.heads + 2 * model.kv_heads) * model.head_dim
    return 68 * model.hidden + 104 * rotated + 8 * split + (32 if model.gated else 10) * model.ffn


def times(job: Job, choice: Choice, told: Explanation) -> dict[str, float]:
    """Seconds of a step by part; their sum is the step."""
    model, hardware = job.model, job.hardware
    forward, backward = passes(job, choice, told)
    sequences = job.batch // choice.data
    layers = model.layers * sequences
    tokens = max(load.tokens for load in told.loads) * sequences
    of_tensor = tokens / choice.tensor
    element_wise = model.layers * element_wise_bytes(model) + LOSS_BYTES * model.vocab
    products = 6 * model.product_weights * of_tensor / (hardware.matmul_rate * LAYER_SHARE)
    exposed = layers * (forward.exposed * (1 + _rings_again(choice)) + backward.exposed)
    exposed += _tensor_seconds(job, choice, tokens) * (1 + _exposed_again(choice))
    exposed += sequences * sum(link.exposed for link in offloading(job, choice, told))
    hidden = products + layers * (forward.seconds + backward.seconds)
    return {
        "attention forward": layers * forward.seconds,
        "attention backward": layers * backward.seconds,
        "matrix products": products,
        "element-wise": element_wise * of_tensor / hardware.copy_rate,
        "recomputation": sum(recomputed(job, choice, told).values()),
        "exposed communication": exposed + _sync_seconds(job, choice, hidden),
        "optimizer": _optimizer_seconds(job, choice),
    }


def recomputed(job: Job, choice: Choice, told: Explanation) -> dict[str, float]:
    """Seconds of what a step computes again, by part."""
    model, hardware = job.model, job.hardware
    layers = model.layers * (job.batch // choice.data)
    tokens = max(load.tokens for load in told.loads) / choice.tensor
    kept = choice.checkpoint == "none"
    weights = weights_again(model, choice)
    traffic = 0.0 if kept else FORWARD_SHARE * element_wise_bytes(model)
    forward, _ = passes(job, choice, told)
    return {
        "attention forward": _rings_again(choice) * layers * forward.seconds,
        "matrix products": 2 * weights * layers * tokens / (hardware.matmul_rate * LAYER_SHARE),
        "element-wise": traffic * layers * tokens / hardware.copy_rate,
    }


def weights_again(model: ModelShape, choice: Choice) -> float:
    """Of a layer, those that tokens are multiplied with again. A recomputation ends when all that
    is kept is there, before the product that goes out of the feed-forward; a checkpoint of several
    layers runs the chunks of all but the last to get to it, before each is recomputed itself.
    """
    out, last = model.hidden * model.ffn, 1 / choice.every
    if choice.checkpoint == "none":
        return model.ffn_weights - out if choice.ff_chunk else 0
    if choice.ff_chunk:
        return model.layer_weights - out + (1 - last) * model.ffn_weights
    return model.layer_weights - last * out


def _rings_again(choice: Choice) -> bool:
    """Whether attention goes round the ring twice."""
    return choice.checkpoint == "full"


def _exposed_again(choice: Choice) -> float:
    """The share of the tensor-parallel transfers that is made again."""
    return 0.4 if choice.checkpoint != "none" else 0.2 if choice.ff_chunk else 0.0


def offloading(job: Job, choice: Choice, told: Explanation) -> tuple[Link, ...]:
    """What goes to the host's memory in a forward and comes back in a backward of a sequence, each
    checkpoint's under the work of another.
    """
    if not choice.offload:
        return ()
    model, layers = job.model, job.model.layers * (job.batch // choice.data)
    parts = recomputed(job, choice, told)
    tokens = max(load.tokens for load in told.loads) / choice.tensor
    products = 6 * model.layer_weights * tokens / (job.hardware.matmul_rate * LAYER_SHARE)
    around = element_wise_bytes(model) * tokens / job.hardware.copy_rate
    attention = passes(job, choice, told)
    covers = (
        products / 3 + FORWARD_SHARE * around + attention[0].seconds,
        products * 2 / 3
        + (1 - FORWARD_SHARE) * around
        + attention[1].seconds
        + sum(parts.values()) / layers,
    )
    num_bytes = checkpoint_bytes(model, choice) * tokens
    return tuple(
        Link(
            name,
            model.layers / choice.every,
            num_bytes,
            job.hardware.host_rate,
            cover * choice.every,
        )
        for name, cover in zip(("to the host", "from the host"), covers, strict=True)
    )


def _tensor_seconds(job: Job, choice: Choice, tokens: int) -> float:
    """Gathers and scatters of tensor-sequence parallelism: four in a layer's forward and six in its
    backward, none of them hidden (arXiv:2205.05198 section 4).
    """
    size, model = choice.tensor, job.model
    num_bytes = 2 * model.hidden * tokens * (size - 1) / size
    return 10 * model.layers * num_bytes / job.reach(size)


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
