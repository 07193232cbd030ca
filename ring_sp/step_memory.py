"""Bytes of a training step on one GPU, by part.

What autograd keeps and makes of a layer of bf16 products, RMSNorm and SwiGLU, in Megatron-core and
in `RingTransformer`: counted storage by storage in tests/test_experiments.py, and checked against a
measured peak in tests/test_planner.py. Below q, k and v stand for their bytes a token, h for the
hidden size and f for the feed-forward's width.
"""

from ring_sp.explanation import Explanation
from ring_sp.job import Choice, Job
from ring_sp.linear_loss import LOGITS
from ring_sp.model_shape import ModelShape

WEIGHT, GRADIENT, STATES = 2, 4, 12
"""Bytes of a weight in bf16, of its gradient in float32, of Adam's master weight and moments."""
RESERVE = 0.04
"""Share of a GPU's memory that is not ours: CUDA's and NCCL's, and gaps in the allocator."""
STATE_PARTS = ("weights", "gradients", "optimizer", "activations kept")
WORK_PARTS = ("attention work", "feed-forward work", "logits", "ring buffers")


def memory(job: Job, choice: Choice, told: Explanation) -> dict[str, float]:
    """Bytes by part; `peak` says which of them are there at once."""
    model, tokens = job.model, max(load.tokens for load in told.loads)
    own, shared = model.weights / choice.tensor, choice.sharing
    whole = choice.shard == "optimizer"
    # FSDP gathers a layer, and the one after it meanwhile.
    gathered = 0 if whole else 2 * WEIGHT * model.layer_weights / choice.tensor
    # Of a weight that is used first and last autograd holds the last one's gradient until the end.
    tied = WEIGHT * model.vocab * model.hidden / choice.tensor if model.tied else 0
    beside = _travelling(model, choice) * tokens / choice.tensor + tied
    again = _again(model, choice)
    parts = (
        WEIGHT * own if whole else WEIGHT * own / shared + gathered,
        GRADIENT * own / (1 if whole else shared),
        STATES * own / shared,
        _kept(model, choice) * tokens / choice.tensor,
        (attention_work(model) + again) * tokens / choice.tensor + beside,
        _ff_work(model, choice, tokens) / choice.tensor + beside,
        _logits(model, choice, tokens),
        _buffers(told, choice),
    )
    return dict(zip(STATE_PARTS + WORK_PARTS, parts, strict=True))


def peak(parts: dict[str, float]) -> float:
    """Most bytes at once: the loss, a layer's attention and its feed-forward follow each other."""
    steady = sum(parts[name] for name in STATE_PARTS)
    attention = parts["attention work"] + parts["ring buffers"]
    return steady + max(attention, parts["feed-forward work"], parts["logits"])


def attention_kept(model: ModelShape) -> int:
    """Bytes a token of q, kv, out and lse."""
    return 2 * (2 * model.heads + 2 * model.kv_heads) * model.head_dim + 4 * model.heads


def layer_kept(model: ModelShape, ff_chunk: int | None = None) -> int:
    """Bytes a token that a layer keeps where nothing is checkpointed but, with `ff_chunk`, its
    feed-forward.

    Inputs and outputs of both norms; q, k, v and out, lse; what the feed-forward's activation gets
    and gives.
    """
    norms = 8 * model.hidden
    if ff_chunk is not None:
        return attention_kept(model) + norms - 2 * model.hidden
    return attention_kept(model) + norms + _inside(model)


def _inside(model: ModelShape) -> int:
    """Bytes a token inside of a feed-forward: 4f into SwiGLU, 2f out of it; as many of gradients,
    and as many while the activation's is computed, when its result is gone.
    """
    return (6 if model.gated else 4) * model.ffn


def _result(model: ModelShape, choice: Choice) -> int:
    """Bytes a token of attention's out and lse, where a checkpoint keeps them."""
    kept = 2 * model.heads * model.head_dim + 4 * model.heads
    return kept if choice.checkpoint == "selective" else 0


def checkpoint_bytes(model: ModelShape, choice: Choice) -> int:
    """Bytes a token that a checkpoint keeps: the input of its first layer, and of each of its
    layers attention's out and lse where they are kept.
    """
    return 2 * model.hidden + choice.every * _result(model, choice)


def offloaded(job: Job, choice: Choice, told: Explanation) -> float:
    """Bytes in the host's memory, for one GPU."""
    tokens = max(load.tokens for load in told.loads) / choice.tensor
    count = job.model.layers / choice.every
    return count * checkpoint_bytes(job.model, choice) * tokens if choice.offload else 0.0


def _kept(model: ModelShape, choice: Choice) -> float:
    """Bytes a token of all layers, and of rotary's cosines and sines."""
    around = 4 * model.head_dim
    if choice.checkpoint == "none":
        return model.layers * layer_kept(model, choice.ff_chunk) + around
    count = model.layers / choice.every
    return min(1 if choice.offload else count, count) * checkpoint_bytes(model, choice) + around


def _travelling(model: ModelShape, choice: Choice) -> float:
    """Bytes a token of the checkpoint that is on its way to or from the host while a layer works;
    before the loss all have arrived.
    """
    others = min(1, model.layers / choice.every - 1) if choice.offload else 0
    return others * checkpoint_bytes(model, choice)


def _again(model: ModelShape, choice: Choice) -> int:
    """Bytes a token that recomputation has made, by attention's backward, of the layers of a
    checkpoint: of the layer at work q, kv, out, lse and the norm's result are left.
    """
    if choice.checkpoint == "none":
        return 0
    others = (choice.every - 1) * layer_kept(model, choice.ff_chunk)
    at_work = attention_kept(model) + 2 * model.hidden
    return others + at_work - choice.every * _result(model, choice)


def attention_work(model: ModelShape) -> int:
    """Bytes a token in a layer's attention backward: dout, dq and its float32 sum, dk and dv and
    theirs, the gradient of the residual stream.
    """
    queries, keys = model.heads * model.head_dim, 2 * model.kv_heads * model.head_dim
    return 8 * queries + 6 * keys + 2 * model.hidden


def kernel_work(model: ModelShape) -> int:
    """Of `attention_work` what a kernel makes inside itself: float32 sums."""
    return 4 * (model.heads + 2 * model.kv_heads) * model.head_dim


def _ff_work(model: ModelShape, choice: Choice, tokens: int) -> float:
    """Bytes in a layer's feed-forward backward: the gradient of its output for all tokens; those of
    its activation, and what is recomputed, for a chunk.
    """
    inside, everywhere = _inside(model), 2 * model.hidden
    if choice.checkpoint != "none":
        again = layer_kept(model, choice.ff_chunk) - _result(model, choice)
        everywhere += choice.every * again - 2 * model.hidden
    if choice.ff_chunk is None:
        return (everywhere + inside) * tokens
    # The gradients of the chunks' inputs, and torch.cat of them; the weights', summed in float32,
    # with a chunk's beside them.
    chunk, sums = min(choice.ff_chunk, tokens), 2 * GRADIENT * model.ffn_weights
    everywhere += 4 * model.hidden
    return everywhere * tokens + (2 * inside + 4 * model.hidden) * chunk + sums


def _logits(model: ModelShape, choice: Choice, tokens: int) -> float:
    """Bytes of the loss beside what layers keep, in forward and backward: the last norm's input and
    result; logits in float32 and once more in bf16, as gradient or result of the product.

    By chunks, `linear_cross_entropy` sums the gradient of the output's weights in float32, with
    products of some words beside it, and keeps that of its input, which a float32 factor scales in
    backward.
    """
    words, hidden = model.vocab / choice.tensor, model.hidden
    if choice.loss_chunk is None:
        return (6 * words + 4 * hidden) * tokens
    chunk = min(choice.loss_chunk, tokens)
    sums = GRADIENT * words * hidden
    product = min(sums, GRADIENT * LOGITS // 16)
    forward = 4 * hidden * tokens + max(6 * words * chunk, 2 * words * chunk + product)
    backward = 2 * hidden * tokens + 8 * hidden * min(tokens, LOGITS // hidden)
    return sums + 2 * hidden * tokens + max(forward, backward)


def _buffers(told: Explanation, choice: Choice) -> float:
    """Bytes of messages in a backward: what is visited and what arrives, of sums what arrived, what
    goes on and what is added; for each of nested rings.
    """
    if choice.stations == 1:
        return 0
    load, visits = told.loads[0], max(load.visits for load in told.loads)
    rings = 2 if min(choice.outer, choice.ring) > 1 else 1
    return rings * (2 * load.backward_data + 3 * load.backward_sums) / max(visits - 1, 1)
