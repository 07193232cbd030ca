"""Ranks agree on what they do together before they do it, so that a mistake is named and not
waited for.
"""

from collections.abc import Callable
from itertools import islice

import torch
import torch.distributed as dist

from ring_sp.topology import Topology

KEPT_AGREEMENTS = 10_000
"""Agreements that a topology remembers; a packed batch with a mask of its own makes two."""

Refusal = ValueError | NotImplementedError
_Report = tuple[str, Refusal | None]


def agreed(topology: Topology, terms: str) -> bool:
    """Whether all ranks of the topology have agreed on these terms, and none has forgotten it."""
    return terms in topology.agreements


def refusal(check: Callable[[], object]) -> Refusal | None:
    """The error that a check raises, to be raised on every rank; None if all is well."""
    try:
        check()
    except (ValueError, NotImplementedError) as error:
        return error
    return None


def agree(
    topology: Topology,
    subject: str,
    terms: str,
    error: Refusal | None,
    device_type: str,
    once: str = "",
) -> None:
    """Raise on every rank if one brings an error or other terms than the rest; else return, with
    the communicators for tensors on `device_type` open.

    Terms that were agreed on before cost a lookup and no communication. An error about a `subject`
    that was agreed on before is raised here alone: the other ranks may be under way. What is said
    `once` is compared with the terms, and not remembered.
    """
    known = topology.agreements
    if error is not None and (terms in known or subject in known):
        raise error
    if terms in known:
        return
    reports: list[_Report] = [(terms + once, error)] * topology.size
    if topology.size > 1:
        dist.all_gather_object(reports, (terms + once, error), group=topology.group)
    _raise_disagreement(reports, topology.rank)
    _connect(topology, device_type)
    known.update({subject: None, terms: None})
    for oldest in list(islice(known, max(len(known) - KEPT_AGREEMENTS, 0))):
        del known[oldest]


def _raise_disagreement(reports: list[_Report], rank: int) -> None:
    errors = {number: error for number, (_, error) in enumerate(reports) if error is not None}
    if rank in errors:
        raise errors[rank]
    if errors:
        number, error = next(iter(errors.items()))
        raise type(error)(f"rank {number} of the sequence-parallel group refused its call: {error}")
    for number, (terms, _) in enumerate(reports):
        if terms != reports[0][0]:
            raise ValueError(
                f"all ranks of a sequence-parallel group must make the same call; rank 0 has "
                f"{reports[0][0]}, rank {number} has {terms}. Give every rank the same batch, "
                f"heads and sequence."
            )


def _connect(topology: Topology, device_type: str) -> None:
    """NCCL wants all ranks in the first call of a group, and a ring may use only some."""
    opened = f"communicators for {device_type}"
    if opened not in topology.agreements:
        for axis in (topology.outer, topology.ring, topology.ulysses):
            if axis.size > 1:
                dist.all_reduce(torch.zeros(1, device=device_type), group=axis.group)
    topology.agreements[opened] = None
