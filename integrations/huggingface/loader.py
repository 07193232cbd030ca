"""Whole batches of any loader, and the part of each that a rank trains on."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from ring_sp.agreement import Refusal, refusal
from ring_sp.integrations.huggingface.batch import RingBatch
from ring_sp.integrations.huggingface.ring import HuggingFaceRing
from ring_sp.loss import IGNORE
from ring_sp.masks import Mask

SOURCES = ("same", "first", "turns")
EPOCH_STRIDE = 0x2545F4914F6CDD1D
"""Between the dropout seeds of epochs."""

Batch = Mapping[str, Any]


class RingLoader:
    """Yields a `RingBatch`, this rank's part, for each whole batch that its ring trains on.

    `source` says whose batches those are. "same": all ranks of a ring read the same ones, which is
    compared (as with DistributedSampler(dataset, num_replicas=manager.size("data"),
    rank=manager.rank("data"))). "first": the ring's first rank reads and sends them to the others,
    whose loaders are not touched. "turns": each rank reads batches of its own (a sampler over the
    whole world), and all of a ring train on one rank's after another's.

    All rings get equally many. One whose batches end early gets its last again without labels, and
    one without any another ring's, which adds nothing to a mean over all tokens: none is dropped
    and none counts twice.
    """

    def __init__(
        self,
        loader: Iterable[Batch],
        ring: HuggingFaceRing,
        source: str = "same",
        inner: Mask | None = None,
        dropout_seed: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """`loader` yields what `ring.batch` takes, as `inner` is what it takes. With `dropout_seed`
        each batch of each epoch drops other attention weights. Parts are moved to `device`, by
        default they stay where the batch is (on the CPU where ranks send batches).

        Collective over data and sequence ranks, and so is each step of an iterator: on every rank
        it raises the errors of `ring.batch` on any, and ValueError for ranks of a ring whose
        batches differ ("same") or do not ("turns"). ValueError for an unknown source.
        """
        if source not in SOURCES:
            raise ValueError(f"source must be one of {', '.join(SOURCES)}; got {source!r}")
        self.loader, self.ring, self.source, self.inner = loader, ring, source, inner
        self.dropout_seed, self.device, self.epoch = dropout_seed, device, 0
        self._len = _common_len(loader, ring, source)

    def __iter__(self) -> Iterator[RingBatch]:
        seed = self.dropout_seed
        if seed is not None:
            seed += EPOCH_STRIDE * self.epoch
        batches = iter(() if _idle(self.ring, self.source) else self.loader)
        for part in ring_parts(batches, self.ring, self.source, self.inner, seed):
            yield part if self.device is None else moved(part, self.device)

    def __len__(self) -> int:
        """Batches of an epoch, the same on all ranks; TypeError where a loader has no length."""
        if self._len is None:
            raise TypeError(f"a {type(self.loader).__name__} on some rank has no length")
        return self._len

    def set_epoch(self, epoch: int) -> None:
        """Pass it on to the loader, or to its samplers, that shuffle by it."""
        self.epoch = epoch
        samplers = (getattr(self.loader, name, None) for name in ("batch_sampler", "sampler"))
        targets: list[Any] = [self.loader] if hasattr(self.loader, "set_epoch") else [*samplers]
        for target in targets:
            if hasattr(target, "set_epoch"):
                target.set_epoch(epoch)


@dataclass(frozen=True)
class _Offer:
    """What a rank says to all others of its next batch."""

    data_rank: int
    rank: int
    """In its ring."""
    checksum: int | None
    """None where it has no batch."""
    labelled: bool
    error: Refusal | None = None


def ring_parts(
    batches: Iterator[Batch],
    ring: HuggingFaceRing,
    source: str = "same",
    inner: Mask | None = None,
    seed: int | None = None,
) -> Iterator[RingBatch]:
    """The parts of `RingLoader`, of an iterator; nothing is read ahead. Batch n drops by seed + n.

    Collective and raising as there.
    """
    last: Batch | None = None
    number, is_first = 0, True
    while True:
        batch = next(batches, None)
        offers = _offers(ring, _offer(batch, last, ring, inner))
        owners = _owners(offers, source, is_first)
        turns = max(map(len, owners.values()))
        if is_first and turns and not all(owners.values()):
            last = _lent(batch, offers, ring)
        is_first = False
        own = owners[ring.manager.rank("data")]
        for turn in range(turns):
            if turn < len(own):
                last = batch if source == "same" else _sent(batch, own[turn], ring)
            assert last is not None
            whole = last if turn < len(own) else _unlabelled(last)
            yield ring.batch(whole, inner, None if seed is None else seed + number)
            number += 1
        if not turns:
            return


def moved(part: RingBatch, device: torch.device | str) -> RingBatch:
    """The part with its tensors on a device."""
    inputs = {
        key: value.to(device) if isinstance(value, Tensor) else value
        for key, value in part.inputs.items()
    }
    labels = None if part.shift_labels is None else part.shift_labels.to(device)
    return replace(part, inputs=inputs, shift_labels=labels)


def _idle(ring: HuggingFaceRing, source: str) -> bool:
    """Whether this rank reads nothing."""
    return source == "first" and ring.manager.rank("sequence") != 0


def _offer(
    batch: Batch | None, last: Batch | None, ring: HuggingFaceRing, inner: Mask | None
) -> _Offer:
    place = ring.manager.rank("data"), ring.manager.rank("sequence")
    if batch is None:
        return _Offer(*place, None, last is None or _has_labels(last))
    error = refusal(lambda: ring.batch(batch, inner))
    return _Offer(*place, _checksum(batch), _has_labels(batch), error)


def _offers(ring: HuggingFaceRing, own: _Offer) -> list[_Offer]:
    """Those of all ranks. Raises the error of any."""
    offers = _gathered(ring, own)
    if own.error is not None:
        raise own.error
    for offer in offers:
        if offer.error is not None:
            raise type(offer.error)(
                f"rank {offer.rank} of the ring of data rank {offer.data_rank} refused its batch: "
                f"{offer.error}"
            )
    return offers


def _owners(offers: list[_Offer], source: str, is_first: bool) -> dict[int, list[int]]:
    """Of each data rank, the ranks of its ring whose batches come next, in turn. Raises ValueError
    on every rank for batches that do not go together.
    """
    rings: dict[int, dict[int, int | None]] = {}
    for offer in offers:
        rings.setdefault(offer.data_rank, {})[offer.rank] = offer.checksum
    for data_rank, found in rings.items():
        alike = len(set(found.values())) == 1
        if source == "same" and not alike:
            raise ValueError(
                f"all ranks of a ring must read the same batches; those of data rank {data_rank} "
                f"differ. Give the sampler num_replicas=manager.size('data') and "
                f"rank=manager.rank('data') and the collator no randomness, or a RingLoader "
                f"source='first' (one rank's batches are sent to its ring) or source='turns' (each "
                f"rank reads its own)."
            )
        if source == "turns" and is_first and alike and len(found) > 1 and found[0] is not None:
            raise ValueError(
                f"with source='turns' each rank of a ring reads batches of its own; those of data "
                f"rank {data_rank} all read the same. Say source='same', or use a sampler over "
                f"the whole world."
            )
    owners = {
        data_rank: [
            rank for rank, checksum in sorted(found.items())
            if checksum is not None and (rank == 0 or source == "turns")
        ]
        for data_rank, found in rings.items()
    }  # fmt: skip
    counts = {len(ranks) for ranks in owners.values()}
    if len(counts) > 1 and not all(offer.labelled for offer in offers):
        raise ValueError(
            "rings have different numbers of batches, and a batch without labels cannot be "
            "repeated without a trace: give labels, or each ring as many batches"
        )
    return owners


def _sent(batch: Batch | None, owner: int, ring: HuggingFaceRing) -> Batch:
    """The batch of one rank of the ring, on the CPU of each."""
    return _broadcast(batch, owner, ring, "sequence")


def _lent(batch: Batch | None, offers: list[_Offer], ring: HuggingFaceRing) -> Batch:
    """The first batch that a rank of any ring has, on the CPU of each."""
    owner = next(rank for rank, offer in enumerate(offers) if offer.checksum is not None)
    return _broadcast(batch, owner, ring, "data_sequence")


def _broadcast(batch: Batch | None, owner: int, ring: HuggingFaceRing, axis: str) -> Batch:
    group = ring.manager.group(axis)
    held = None
    if ring.manager.rank(axis) == owner:
        assert batch is not None
        held = {key: x.cpu() if isinstance(x, Tensor) else x for key, x in batch.items()}
    sent = [held]
    if group is not None:
        dist.broadcast_object_list(sent, src=dist.get_global_rank(group, owner), group=group)
    assert sent[0] is not None
    return sent[0]


def _has_labels(batch: Batch) -> bool:
    return any(batch.get(key) is not None for key in ("labels", "shift_labels"))


def _unlabelled(batch: Batch) -> Batch:
    """The batch with no token that counts."""
    named = {key: batch[key] for key in ("labels", "shift_labels") if batch.get(key) is not None}
    return {**batch, **{key: torch.full_like(x, IGNORE) for key, x in named.items()}}


def _checksum(batch: Batch) -> int:
    """Of the keys, the shapes and what is in them; embeddings are known by each row's last."""
    total = 0
    for key, value in sorted(batch.items()):
        text = f"{key} {value}"
        if isinstance(value, Tensor):
            known = value[:, -1] if value.is_floating_point() and value.dim() > 2 else value
            content = known.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
            text, total = f"{key} {value.dtype} {tuple(value.shape)}", crc32(content, total)
        total = crc32(text.encode(), total)
    return total


def _gathered(ring: HuggingFaceRing, own: Any) -> list[Any]:
    """What all data and sequence ranks say."""
    group = ring.manager.group("data_sequence")
    if group is None or dist.get_world_size(group) == 1:
        return [own]
    said = [own] * dist.get_world_size(group)
    dist.all_gather_object(said, own, group=group)
    return said


def _common_len(loader: Iterable[Batch], ring: HuggingFaceRing, source: str) -> int | None:
    """Steps of an epoch; None where a rank that reads does not know how many."""
    found: int | None = 0
    if source == "turns" or ring.manager.rank("sequence") == 0:
        try:
            found = len(loader)  # type: ignore[arg-type]
        except TypeError:
            found = None
    lens: dict[int, list[int]] = {}
    for data_rank, count in _gathered(ring, (ring.manager.rank("data"), found)):
        if count is None:
            return None
        lens.setdefault(data_rank, []).append(count)
    # Between two neighbouring lengths, each round has as many turns as the ring with the most.
    cuts = sorted({0, *(count for counts in lens.values() for count in counts)})
    return sum(
        (stop - start) * max(sum(count > start for count in counts) for counts in lens.values())
        for start, stop in pairwise(cuts)
    )
