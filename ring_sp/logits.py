"""The largest attention scores, which training watches and qk-clip bounds (arXiv:2507.20534,
section 2.1).
"""

import torch
from torch import Tensor

from ring_sp.fit import Options, agree_on_scores, typed
from ring_sp.kernels import row_max
from ring_sp.kernels.contract import Step, accumulation_dtype
from ring_sp.operator import dense, rows_first
from ring_sp.plan import Plan
from ring_sp.ring import Message
from ring_sp.sequence import ShardedSequence, numbered
from ring_sp.ulysses import kv_replication, to_heads, to_sequence


def max_logits(
    q: Tensor,
    k: Tensor,
    sequence: ShardedSequence,
    kv_sequence: ShardedSequence | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The largest score that this rank's queries give to a key that they may see, for each head.
    Collective over the sequence's topology: keys go once round the ring.

    Arguments are those of `ring_attention`, and so are scores: after the softcap, where there is
    one, and without sinks and dropout. Returns [H] in float32 (float64 for float64 inputs), largest
    over batch entries and this rank's queries, -inf where they see nothing; it has no gradient. Its
    maximum over the ranks is that of the whole sequence. Raises as `ring_attention` does.
    """
    keys = sequence if kv_sequence is None else kv_sequence
    options = Options(scale, softcap)
    if not typed(q, k, k, sequence, keys, None, options):
        # What torch's operators would not even take; nothing comes back from here.
        agree_on_scores(q, k, sequence, keys, options)
    found: Tensor = torch.ops.ring_sp.max_logits(
        q.detach(), k.detach(), sequence.number, keys.number, scale, softcap
    )
    return found


@torch.library.custom_op(
    "ring_sp::max_logits",
    mutates_args=(),
    schema="(Tensor q, Tensor k, int sequence, int kv_sequence, float? scale, float? softcap)"
    " -> Tensor",
)
def operate(
    q: Tensor,
    k: Tensor,
    number: int,
    kv_number: int,
    scale: float | None,
    softcap: float | None,
) -> Tensor:
    """`max_logits` as an operator of torch, which its compiler takes as it is."""
    sequence, keys = numbered(number), numbered(kv_number)
    agree_on_scores(q, k, sequence, keys, Options(scale, softcap))
    ulysses, lens = sequence.topology.ulysses, sequence.peer_lens
    copies = kv_replication(q.shape[2], k.shape[2], ulysses.size)
    if copies > 1:
        k = k.repeat_interleave(copies, 2)
    q, k = dense(to_heads(q, ulysses, lens)), to_heads(k, ulysses, keys.peer_lens)
    factor = q.shape[3] ** -0.5 if scale is None else scale
    with torch.cuda.device_of(q):
        rows = _row_max(q, k, sequence.plan(keys), factor)
    # A row of this rank's has its heads at all peers.
    largest = to_sequence(rows_first(rows), ulysses, lens).amax((0, 1, 3))
    if softcap is None:
        return largest
    return largest.where(largest == -torch.inf, softcap * torch.tanh(largest / softcap))


@operate.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape[2], dtype=accumulation_dtype(q.dtype))


def _row_max(q: Tensor, k: Tensor, plan: Plan, scale: float) -> Tensor:
    """[B, H, Sq]: the largest q.k * scale of each row over the keys of all stations."""
    batch, num_rows, heads, _ = q.shape
    top = q.new_full((batch, heads, num_rows), -torch.inf, dtype=accumulation_dtype(q.dtype))

    def visit(seen: Tensor, number: int) -> None:
        step = Step(plan.tiles(number), scale, derived=plan.derived[number])
        theirs = seen.view(batch, -1, *k.shape[2:])
        with torch.autocast(seen.device.type, enabled=False):
            row_max.fold(q, theirs, step, top)

    per_key = k.shape[2] * k.shape[3]
    message = Message(
        lambda source: batch * plan.kv_lens[source] * per_key,
        k.dtype,
        k.device,
        blocks=lambda tensor: [tensor.view(batch, -1, per_key)],
    )
    plan.show(k.flatten(), visit, message)
    return top
