from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from conftest import World

pytest.importorskip("megatron")
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron_gpt import case, config, start
from oracle import attention
from ringed import relative

from ring_sp.integrations.megatron import MegatronRing, RingCoreAttention

Q_LEN, KV_LEN, CUTS, LENS = 32, 48, (0, 8, 24, 32), (5, 16, 7)


def attended(kind: str, mask_type: AttnMaskType) -> list[float]:
    """How far out, dq, dk and dv of this rank are from attention over the whole."""
    given = case(ring=2)
    start(given)
    ring = MegatronRing.from_options(given.options, parallel_state.get_context_parallel_group())
    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
    core = RingCoreAttention(config(given), 1, mask_type, kind, pg_collection=groups, ring=ring)
    kv_len = KV_LEN if kind == "cross" else Q_LEN
    visible, params, sequence = torch.ones(Q_LEN, kv_len, dtype=torch.bool), None, None
    if kind == "self":
        visible.zero_()
        for (start_, stop), length in zip(pairwise(CUTS), LENS, strict=True):
            own = slice(start_, start_ + length)
            visible[own, own] = True
            assert start_ + length <= stop
        visible = visible.tril() if mask_type == AttnMaskType.causal else visible
        real = torch.tensor([0, 5, 21, 28], dtype=torch.int32)
        padded = torch.tensor(CUTS, dtype=torch.int32)
        params = PackedSeqParams("thd", real, real, padded, padded, 16, 16)
        sequence = ring.packed(params).sequence
    sequence = sequence or ring.sequence(Q_LEN)
    keys = ring.sequence(KV_LEN) if kind == "cross" else sequence
    make = torch.Generator().manual_seed(1)
    whole = [
        torch.randn(1, length, heads, 8, generator=make, dtype=torch.float64, requires_grad=True)
        for length, heads in ((Q_LEN, 4), (kv_len, 2), (kv_len, 2))
    ]
    cotangent = torch.randn(1, Q_LEN, 4, 8, generator=make, dtype=torch.float64)
    q, k, v = whole
    wanted = attention(q, k, v, visible)[0]
    places = (sequence, keys, keys)
    expected = torch.autograd.grad(wanted, whole, cotangent)
    parts = [
        place.shard(x.detach()).requires_grad_() for x, place in zip(whole, places, strict=True)
    ]
    given_parts = [x[0] if params else x.transpose(0, 1) for x in parts]
    out = core(*given_parts, None, packed_seq_params=params).reshape(1, -1, 4, 8)
    got = torch.autograd.grad(out, parts, sequence.shard(cotangent))
    return [
        relative(out, sequence.shard(wanted.detach())),
        *(relative(g, p.shard(w)) for g, w, p in zip(got, expected, places, strict=True)),
    ]


@pytest.mark.parametrize(
    ("kind", "mask_type"),
    [
        ("self", AttnMaskType.causal),
        ("self", AttnMaskType.padding),
        ("cross", AttnMaskType.no_mask),
    ],
)
def test_a_core_by_itself_attends_as_megatron_asks(
    world: Callable[[int], World], kind: str, mask_type: AttnMaskType
) -> None:
    for distances in world(2).run(attended, kind, mask_type):
        assert max(distances) < 1e-12, distances
