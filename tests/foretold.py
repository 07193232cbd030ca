"""Calls, and what explain says of them from shapes alone."""

from itertools import product
from random import Random

import torch
from ringed import Case, Heads
from visibility import cases

from ring_sp import Explanation, ShardedSequence, explain, layout
from ring_sp.ring import Axis
from ring_sp.topology import Topology

MASKS = ("full", "causal", "window", "documents", "documents_window")
LENGTHS = ((29, None, False), (24, None, True), (31, 17, False), (37, 41, True))
"""Of queries and keys, and whether there are sinks."""
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)


def calls(seed: str, heads: Heads) -> list[tuple[Case, bool]]:
    """One for each mask and layout, and whether it returns lse."""
    draw, asked = Random(seed), []
    for mask, name in product(MASKS, layout.LAYOUTS):
        seq_len, kv_len, sinks = draw.choice(LENGTHS)
        case = Case(mask, name, seq_len, kv_len, heads, sinks=sinks, dtype=draw.choice(DTYPES))
        asked.append((case, draw.random() < 0.5))
    return asked


def places(case: Case, topology: Topology) -> tuple[ShardedSequence, ShardedSequence]:
    """The sequences of the queries and of the keys."""
    mask = cases(max(case.seq_len, case.kv_len or 0))[case.mask][0]
    queries = ShardedSequence(case.seq_len, topology, mask, case.layout)
    if case.kv_len is None:
        return queries, queries
    return queries, ShardedSequence(case.kv_len, topology, layout=case.layout)


def station(sizes: dict[str, int], rank: int) -> Topology:
    """The topology of a rank without processes."""
    outer, ring, ulysses = (sizes.get(name, 1) for name in ("outer", "ring", "ulysses"))
    return Topology(
        Axis(rank // ulysses // ring, outer),
        Axis(rank // ulysses % ring, ring),
        Axis(rank % ulysses, ulysses),
        gather=sizes.get("gather"),
    )


def foretold(case: Case, return_lse: bool, topology: Topology) -> Explanation:
    """What explain says on one rank."""
    queries, keys = places(case, topology)
    (heads, kv_heads), kv_len = case.heads, keys.local_len
    shapes = [
        (2, queries.local_len, heads, case.head_dim),
        (2, kv_len, kv_heads, case.head_dim),
        (2, kv_len, kv_heads, case.v_head_dim),
        (heads,),
    ]
    q, k, v, sinks = (torch.empty(*shape, dtype=case.dtype, device="meta") for shape in shapes)
    return explain(
        q,
        k,
        v,
        queries,
        None if keys is queries else keys,
        sinks=sinks if case.sinks else None,
        return_lse=return_lse,
        device_type="cpu",
    )
