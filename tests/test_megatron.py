from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
import torch.distributed as dist
from conftest import World

pytest.importorskip("megatron")
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from ranks import raised
from ringed import relative
from torch import Tensor

from ring_sp import ShardedSequence, masks
from ring_sp.integrations.megatron import (
    MegatronRing,
    RingCoreAttention,
    RingSequenceParams,
    use_ring_positions,
    with_ring_attention,
)
from ring_sp.integrations.megatron.rotary import Place

SEQ_LEN, VOCAB, BATCH = 48, 32, 2
Result = tuple[Tensor, dict[str, Tensor]]
DOCUMENTS = masks.documents([0, 7, 30, SEQ_LEN])


@dataclass(frozen=True)
class Case:
    """How the ranks of a world share a GPT."""

    tensor: int = 1
    ring: int = 1
    ulysses: int = 1
    outer: int = 1
    layout: str = "zigzag"
    mask: masks.Mask | None = None
    positions: str = "rope"
    groups: int = 2
    interleaved: bool = False


def config(case: Case, **options: object) -> TransformerConfig:
    return TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=case.groups,
        tensor_model_parallel_size=case.tensor,
        context_parallel_size=case.ring,
        rotary_interleaved=case.interleaved,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        **{"attention_dropout": 0.0, **options},
    )


@cache
def rings(case: Case) -> MegatronRing:
    return MegatronRing.from_group(
        parallel_state.get_context_parallel_group(),
        layout=case.layout,
        ulysses=case.ulysses,
        outer=case.outer,
    )


def start(case: Case) -> MegatronRing:
    """The ring of this case, in Megatron's groups: those at hand if their sizes fit."""
    if not parallel_state.is_initialized() or (case.tensor, case.ring) != (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
    ):
        rings.cache_clear()
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=case.tensor, context_parallel_size=case.ring
        )
    return rings(case)


def gpt(case: Case, ring: MegatronRing) -> GPTModel:
    torch.manual_seed(3)
    model = GPTModel(
        config(case),
        with_ring_attention(get_gpt_layer_local_spec(), ring),
        vocab_size=VOCAB,
        max_sequence_length=SEQ_LEN,
        position_embedding_type=case.positions,
    )
    use_ring_positions(model, ring)
    return model.double()


def run(case: Case, data_rank: int) -> Result:
    """This rank's logits for the batch of a data rank, and the gradients of its weights."""
    ring = start(case)
    model = gpt(case, ring)
    make = torch.Generator().manual_seed(5 + data_rank)
    tokens = torch.randint(VOCAB, (BATCH, SEQ_LEN), generator=make)
    cotangent = torch.randn(BATCH, SEQ_LEN, VOCAB, generator=make, dtype=torch.float64)
    sequence = ring.sequence(SEQ_LEN, case.mask or masks.causal())
    params = RingSequenceParams(sequence=sequence) if case.mask else None
    positions = sequence.positions().expand(BATCH, -1)
    logits = model(sequence.shard(tokens), positions, None, packed_seq_params=params)
    own = sequence.shard(cotangent).chunk(case.tensor, -1)
    (logits * own[parallel_state.get_tensor_model_parallel_rank()]).sum().backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    return logits.detach(), {name: g for name, g in gradients.items() if g is not None}


def errors(case: Case, whole: list[Result]) -> list[tuple[float, str]]:
    """How far logits and summed gradients are from those of a rank by itself, which has each data
    rank's batch in turn; worst first.
    """
    ring, data_rank = start(case), parallel_state.get_data_parallel_rank()
    logits, gradients = run(case, data_rank)
    column = parallel_state.get_tensor_model_parallel_rank()
    sequence = ring.sequence(SEQ_LEN, case.mask or masks.causal())
    got = {"logits": logits}
    wanted = {"logits": sequence.shard(whole[data_rank][0]).chunk(case.tensor, -1)[column]}
    for name, gradient in gradients.items():
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        dist.all_reduce(gradient, group=group)
        got[name], wanted[name] = gradient, torch.stack([one[1][name] for one in whole]).sum(0)
        for dim, size in enumerate(gradient.shape):
            if wanted[name].shape[dim] != size:
                wanted[name] = wanted[name].chunk(case.tensor, dim)[column]
    return sorted(((relative(got[name], wanted[name]), name) for name in got), reverse=True)


@pytest.mark.parametrize(
    ("size", "case"),
    [
        (1, Case()),
        (4, Case(ring=4)),
        (4, Case(ring=4, layout="striped", mask=DOCUMENTS)),
        (4, Case(ring=4, layout="contiguous", interleaved=True)),
        (4, Case(tensor=2, ring=2, mask=DOCUMENTS)),
        (4, Case(tensor=2, ring=2, layout="striped", positions="learned_absolute")),
        (4, Case(ring=4, groups=1)),
        (4, Case(ring=4, ulysses=2, mask=DOCUMENTS)),
        (4, Case(ring=4, outer=2, layout="striped")),
        (4, Case(ring=2, layout="contiguous", mask=masks.sliding_window(9))),
        (8, Case(tensor=2, ring=2, mask=DOCUMENTS)),
        (8, Case(tensor=2, ring=4, ulysses=2, layout="striped")),
    ],
    ids=str,
)
def test_a_gpt_on_many_ranks_equals_one_rank(
    world: Callable[[int], World], size: int, case: Case
) -> None:
    alone = replace(case, tensor=1, ring=1, ulysses=1, outer=1)
    data_size = size // (case.tensor * case.ring)
    whole = [world(1).run(run, alone, rank)[0] for rank in range(data_size)]
    for worst, *_ in world(size).run(errors, case, whole):
        assert worst[0] < 1e-12, worst


def core(ring: MegatronRing | None = None, **options: object) -> RingCoreAttention:
    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
    kind, comm = str(options.pop("attention_type", "self")), options.pop("cp_comm_type", None)
    case = Case(ring=groups.cp.size())
    return RingCoreAttention(
        config(case, **options),
        1,
        AttnMaskType.causal,
        kind,
        pg_collection=groups,
        ring=ring,
        cp_comm_type=comm,
    )


def refusals() -> dict[str, str]:
    """What each misuse raises on this rank."""
    ring, x = start(Case(ring=2)), torch.zeros(4, 1, 4, 8)
    bare = MegatronRing.from_group(
        dist.new_group([dist.get_rank()], use_local_synchronization=True)
    )
    attend, empty = core(ring), ModuleSpec(module=torch.nn.Identity)
    thd = PackedSeqParams(qkv_format="thd")
    uneven_thd = PackedSeqParams("thd", torch.tensor([0, 3, 8]), torch.tensor([0, 4, 8]))
    seen = RingSequenceParams(sequence=ring.sequence(8))
    prefix = RingSequenceParams(sequence=ring.sequence(8, masks.prefix_lm(2)))
    foreign = RingSequenceParams(sequence=ShardedSequence(4))
    striped = core(MegatronRing(ring.topology, "striped"))
    uneven = RingSequenceParams(sequence=ring.sequence(7))
    fresh = core(MegatronRing(ring.topology))
    return {
        "sinks": raised(core, softmax_type="learned"),
        "kind": raised(core, attention_type="sideways"),
        "another ring": raised(core, bare),
        "graphs": raised(core, cuda_graph_impl="transformer_engine"),
        "window": raised(core(window_size=(8, 0)), x, x, x, None, packed_seq_params=prefix),
        "packed cross": raised(core(attention_type="cross"), x, x, x, None, None, None, seen),
        "a2a": raised(core, cp_comm_type="a2a"),
        "another topology": raised(attend, x, x, x, None, packed_seq_params=foreign),
        "positions": raised(striped, x, x, x, None),
        "uneven positions": raised(fresh, x, x, x, None, packed_seq_params=uneven),
        "stock positions": raised(fresh, x, x, x, None),
        "no sequence": raised(attend, x, x, x, None, packed_seq_params=RingSequenceParams()),
        "mask tensor": raised(attend, x, x, x, torch.ones(1, 1, 8, 8)),
        "mask type": raised(attend, x, x, x, None, AttnMaskType.padding),
        "bias": raised(attend, x, x, x, None, attention_bias=x),
        "thd": raised(attend, x[:, 0], x[:, 0], x[:, 0], None, packed_seq_params=thd),
        "thd keys": raised(attend, x[:, 0], x[:, 0], x[:, 0], None, packed_seq_params=uneven_thd),
        "nothing to replace": raised(with_ring_attention, empty, ring),
        "ulysses": raised(MegatronRing.from_group, ring.topology.group, ulysses=3),
        "layout": raised(MegatronRing(ring.topology, "spiral").sequence, 8, masks.causal()),
    }


def test_what_the_ring_cannot_do_is_refused_by_name(world: Callable[[int], World]) -> None:
    messages = {
        "window": "cannot narrow the mask prefix_lm(2)",
        "sinks": "softmax_type 'learned'; use one of vanilla",
        "kind": "attention_type 'sideways'",
        "another ring": "Megatron's context-parallel group has [0, 1]",
        "graphs": "no CUDA graphs",
        "packed cross": "cross attention has no packed sequences",
        "a2a": "got cp_comm_type 'a2a'",
        "another topology": "another topology",
        "positions": "call use_ring_positions",
        "uneven positions": "call use_ring_positions",
        "mask tensor": "RingSequenceParams",
        "mask type": "got AttnMaskType.padding",
        "bias": "no attention bias",
        "thd": "need cu_seqlens_q in their PackedSeqParams",
        "thd keys": "packs queries and keys alike",
        "nothing to replace": "no core_attention to replace",
        "ulysses": "has 2 ranks",
        "layout": "got 'spiral'",
    }
    for answers in world(2).run(refusals):
        for name, message in messages.items():
            assert message in answers[name], (name, answers[name])
        assert answers["stock positions"] == answers["no sequence"] == ""


def ring_over_the_tensor_ranks() -> str:
    """What is said of a ring of the right size over the wrong ranks."""
    start(Case(tensor=2, ring=2))
    return raised(core, MegatronRing.from_group(parallel_state.get_tensor_model_parallel_group()))


def test_a_ring_over_other_ranks_is_refused(world: Callable[[int], World]) -> None:
    assert all("made for the ranks" in told for told in world(4).run(ring_over_the_tensor_ranks))


def test_without_a_ring_the_core_takes_the_context_parallel_group(
    world: Callable[[int], World],
) -> None:
    assert world(2).run(sizes_of_a_bare_core) == [2, 2]


def sizes_of_a_bare_core() -> int:
    start(Case(ring=2))
    return core().ring.topology.ring_size


def test_a_cast_to_bf16_leaves_the_angles_alone(world: Callable[[int], World]) -> None:
    assert all(world(1).run(angles_survive_bf16))


def angles_survive_bf16() -> bool:
    ring = start(Case())
    model, sequence = gpt(Case(), ring), ring.sequence(4096, masks.causal())
    place = Place(RingSequenceParams(sequence=sequence))
    before = model.rotary_pos_emb(place)
    return torch.equal(before, model.bfloat16().rotary_pos_emb(place))
