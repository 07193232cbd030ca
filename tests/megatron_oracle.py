"""A GPT over a ring, and how far it is from stock Megatron on one rank by itself."""

from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron_gpt import SEQ_LEN, VOCAB, Case, alone, batch, built, grads, is_mtp, start
from megatron_on_cpu import OnCpu
from ringed import relative
from torch import Tensor

from ring_sp.integrations.megatron import install

SEED = 23
"""From which dropout draws."""

Result = tuple[Tensor, dict[str, Tensor]]


def labels(tokens: Tensor, counted: Tensor) -> dict[str, Tensor]:
    """What a model with multi-token prediction takes besides; its labels need no shift."""
    return {"labels": (tokens * 7 + 3) % VOCAB, "loss_mask": counted.double()}


def documents(given: Case) -> list[range]:
    """The real tokens of each document; all of them where nothing is packed."""
    cuts = given.cuts or (0, SEQ_LEN)
    lens = given.lens or tuple(stop - start for start, stop in pairwise(cuts))
    return [range(cut, cut + length) for cut, length in zip(cuts, lens, strict=False) if length]


def stock(given: Case, data_rank: int, ringed: bool = False) -> Result:
    """What Megatron's own attention makes of a data rank's batch on one rank, each document by
    itself: logits (losses of a model with multi-token prediction), 0 in padding, and gradients.

    `ringed` for a ring of one rank instead, where Megatron has no attention of its own.
    """
    start(alone(given))
    made = install(alone(given).options) if ringed else None
    model = built(alone(given))
    if made:
        made.remove()
    tokens, cotangent = batch(given, data_rank)
    results = torch.zeros_like(cotangent)
    for held in documents(given):
        place = slice(held.start, held.stop)
        own = tokens[:, place]
        later = torch.ones(len(held), len(held), dtype=torch.bool).triu(1)[None, None]
        positions = torch.arange(len(held)).expand_as(own)
        extra = labels(own, torch.ones_like(own)) if is_mtp(given) else {}
        torch.manual_seed(SEED)
        with OnCpu():
            out = model(own, positions, None if ringed else later, **extra)
        results[:, place] = out.detach()
        (out * cotangent[:, place]).sum().backward()
    return results, grads(model)


def packed(given: Case) -> PackedSeqParams | None:
    """What Megatron's scripts tell the model of packed documents."""
    if not given.cuts:
        return None
    cuts = torch.tensor(given.cuts, dtype=torch.int32)
    real, padded = cuts, None
    if given.lens:
        real = torch.tensor([*accumulate(given.lens, initial=0)], dtype=torch.int32)
        padded = cuts
    longest = int(cuts.diff().max())
    return PackedSeqParams("thd", real, real, padded, padded, longest, longest)


def errors(given: Case, whole: list[Result]) -> list[tuple[float, str]]:
    """How far this rank's logits and the summed gradients are from those of `stock`, which has each
    data rank's batch in turn; worst first.
    """
    data_rank = dist.get_rank() // (given.tensor * given.ring)
    start(given)
    made = install(given.options)
    try:
        model = built(given)
        ring = made.built_ring()
        params = packed(given)
        place = ring.packed(params) if params else None
        sequence = place.sequence if place else ring.sequence(SEQ_LEN)
        assert sequence is not None
        tokens, cotangent = (sequence.shard(x) for x in batch(given, data_rank))
        positions = place.positions() if place else sequence.positions()
        counted = torch.zeros(1, SEQ_LEN, dtype=torch.bool)
        for held in documents(given):
            counted[:, held.start : held.stop] = True
        counted = sequence.shard(counted)
        logits, gradients = step(given, model, tokens, cotangent, positions, counted, params)
    finally:
        made.remove()
    expected = sequence.shard(whole[data_rank][0])
    if expected.dim() == 3:
        expected = expected.chunk(given.tensor, -1)[parallel_state.get_tensor_model_parallel_rank()]
    logits[:, ~counted[0]] = 0
    summed = distances(given, gradients, whole, tagged(model))
    return sorted([(relative(logits, expected), "logits"), *summed], reverse=True)


def step(
    given: Case,
    model: GPTModel,
    tokens: Tensor,
    cotangent: Tensor,
    positions: Tensor,
    counted: Tensor,
    params: PackedSeqParams | None,
) -> Result:
    """This rank's logits or losses, and the gradients of its weights."""
    extra = labels(tokens, counted.expand_as(tokens)) if is_mtp(given) else {}
    torch.manual_seed(SEED)
    out = model(tokens, positions.expand_as(tokens), None, packed_seq_params=params, **extra)
    if out.dim() == 3:
        rank = parallel_state.get_tensor_model_parallel_rank()
        cotangent = cotangent.chunk(given.tensor, -1)[rank] * counted[..., None]
    else:
        cotangent = cotangent * counted
    (out * cotangent).sum().backward()
    return out.detach(), grads(model)


def tagged(model: GPTModel) -> set[str]:
    """Weights whose gradients Megatron sums over tensor ranks."""
    if not model.config.sequence_parallel:
        return set()
    return {n for n, w in model.named_parameters() if getattr(w, "sequence_parallel", False)}


def distances(
    given: Case, gradients: dict[str, Tensor], whole: list[Result], tensor_sums: set[str]
) -> list[tuple[float, str]]:
    """How far the gradients, summed over ranks as Megatron does, are from those of one rank."""
    column = parallel_state.get_tensor_model_parallel_rank()
    found = []
    for name, gradient in gradients.items():
        dist.all_reduce(
            gradient, group=parallel_state.get_data_parallel_group(with_context_parallel=True)
        )
        if name in tensor_sums:
            dist.all_reduce(gradient, group=parallel_state.get_tensor_model_parallel_group())
        wanted = torch.stack([one[1][name] for one in whole]).sum(0)
        for dim, size in enumerate(gradient.shape):
            if wanted.shape[dim] != size:
                wanted = wanted.chunk(given.tensor, dim)[column]
        found.append((relative(gradient, wanted), name))
    return found
