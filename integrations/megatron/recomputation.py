"""Attention's results kept from the forward of Megatron's checkpoints to their recomputation.

A checkpoint of Megatron's (`tensor_parallel.checkpoint`, `CheckpointWithoutOutput`, Transformer
Engine's) takes the states of the tracker of random numbers before its forward, holds them as long
as its backward may come, and puts them back before it computes again. Among them is a ticket of
ours, a tensor that is another for each call of attention in a checkpoint's forward: by it, and not
by what is in it, the same call is known again in the recomputation, whatever a schedule has run in
between, and when it is gone no recomputation can come.
"""

from collections.abc import Callable
from dataclasses import dataclass
from weakref import ref

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ring_sp import ShardedSequence
from ring_sp.integrations.megatron.graphs import form_of
from ring_sp.kept import Kept

STREAM = "ring-attention-kept"
"""The name of the ticket among the states of Megatron's tracker of random numbers."""


Places = tuple[ShardedSequence, ShardedSequence | None]


@dataclass
class _Call:
    """A call of attention in the forward of a checkpoint."""

    ticket: ref[Tensor]
    found: tuple[Kept, Tensor, Places] | None
    """Its result, the ticket of the call after it, and the sequences, by whose numbers the result
    is known; None where they are spent: once they have served, and where two forwards had the
    ticket."""


class KeptInCheckpoints:
    """The results of attention of the checkpoints whose backward may come."""

    def __init__(self) -> None:
        self._calls: dict[int, _Call] = {}
        """By the id of the ticket, in the order of time."""

    def __len__(self) -> int:
        """How many results are held."""
        return sum(call.found is not None for call in self._calls.values())

    def begin(self) -> None:
        """Before the first checkpoint of a model's forward: see to it that there is a ticket. Where
        nothing calls this, the first call of all goes without.
        """
        self._forget()
        if _ticket() is None:
            _issue(_new_ticket())

    def attended(self, attend: Callable[[], Tensor], places: Places) -> Tensor:
        """attend(), which calls `ring_attention` once, over `places`: in a checkpoint's forward it
        is recorded, in the recomputation of the same call replayed.
        """
        self._forget()
        ticket = _ticket()
        if ticket is None:
            _issue(_new_ticket())
            return attend()
        call = self._calls.get(id(ticket))
        if call is None:
            # A call that keeps its graph is not recomputed from here.
            return attend() if torch.is_grad_enabled() else self._record(ticket, attend, places)
        found, recomputing = call.found, torch._C._current_graph_task_id() != -1
        if torch.is_grad_enabled() or not recomputing:
            # It serves now; or the random numbers were put back for another forward, and a ticket
            # does not say which of the two is recomputed. The forward of a checkpoint inside the
            # recomputation of another leaves it, to be recomputed in turn.
            call.found = None
        if found is None or not recomputing:
            _issue(_new_ticket())
            return attend()
        kept, following, _ = found
        _issue(following)
        with kept.replaying():
            return attend()

    def _record(self, ticket: Tensor, attend: Callable[[], Tensor], places: Places) -> Tensor:
        following, kept = _new_ticket(), Kept()
        with kept.recording():
            out = attend()
        self._calls[id(ticket)] = _Call(ref(ticket), (kept, following, places))
        _issue(following)
        return out

    def _forget(self) -> None:
        """Let go of the calls that no checkpoint can ask for. A call that goes lets go of the
        ticket after it, whose turn is next: no chain of them unwinds at once.
        """
        for key, call in list(self._calls.items()):
            if call.ticket() is None:
                call.found = None
                del self._calls[key]


def keeps(config: TransformerConfig, wanted: bool) -> bool:
    """Whether a model recomputes, in a way that can take what was kept: a CUDA graph registers all
    states of the tracker, and Megatron does not recompute while it captures one.
    """
    return wanted and config.recompute_granularity is not None and form_of(config) == "none"


def _new_ticket() -> Tensor:
    # In the form of a CUDA generator's state, as Megatron writes the tracker into checkpoints.
    return torch.zeros(16, dtype=torch.uint8, device="cpu")


def _ticket() -> Tensor | None:
    found = get_cuda_rng_tracker().states_.get(STREAM)
    return found if isinstance(found, Tensor) else None


def _issue(ticket: Tensor) -> None:
    tracker = get_cuda_rng_tracker()
    # Another dictionary: the one at hand may be a checkpoint's, whose backward may come again.
    tracker.states_ = {**tracker.states_, STREAM: ticket}
