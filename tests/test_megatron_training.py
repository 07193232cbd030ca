"""Training steps of Megatron's own schedules, optimizers and checkpoints over rings."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import World

pytest.importorskip("megatron")
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron_on_cpu import OnCpu, pretend_there_is_a_gpu
from torch import Tensor

from ring_sp.integrations.megatron import MegatronRing, RingOptions, install

SEQ_LEN, VOCAB, ROWS, MICRO, STEPS = 32, 32, 2, 2, 2
Options = dict[str, Any]
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


def build(options: Options) -> tuple[list[DistributedDataParallel], Any, MegatronRing]:
    """Model chunks, optimizer and ring, as Megatron's scripts build them."""
    tensor, ring, stages = (options.get(name, 1) for name in ("tensor", "ring", "pipeline"))
    virtual, experts = options.get("virtual"), options.get("experts", 1)
    pretend_there_is_a_gpu()
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        *(tensor, stages, virtual), context_parallel_size=ring, expert_model_parallel_size=experts
    )
    model_parallel_cuda_manual_seed(3, inference_rng_tracker=True, force_reset_rng=True)
    config = TransformerConfig(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=virtual,
        context_parallel_size=ring,
        expert_model_parallel_size=experts,
        sequence_parallel=tensor > 1,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        finalize_model_grads_func=finalize_model_grads,
        **{"calculate_per_token_loss": True, **options.get("config", {})},
    )
    layout, chunk_size = options.get("layout", "zigzag"), options.get("chunk")
    made = install(RingOptions(ring, layout, ff_chunk=chunk_size))
    try:
        chunks = [chunk(config, stage if virtual else None) for stage in range(virtual or 1)]
    finally:
        made.remove()
    sharded = options.get("sharded", False)
    setting = DistributedDataParallelConfig(use_distributed_optimizer=sharded)
    wrapped = [DistributedDataParallel(config, setting, model) for model in chunks]
    adam = OptimizerConfig(lr=0.01, use_distributed_optimizer=sharded, clip_grad=1.0)
    return wrapped, get_megatron_optimizer(adam, wrapped), made.built_ring()


def chunk(config: TransformerConfig, virtual_stage: int | None) -> GPTModel:
    """A stage of the model; its weights go by their names in the whole."""
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=virtual_stage)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=virtual_stage)
    model = GPTModel(
        config,
        get_gpt_decoder_block_spec(config, False, vp_stage=virtual_stage),
        vocab_size=VOCAB,
        max_sequence_length=SEQ_LEN,
        position_embedding_type="rope",
        pre_process=first,
        post_process=last,
        share_embeddings_and_output_weights=False,
        vp_stage=virtual_stage,
    )
    offset = {
        f"layers.{n}.": f"layers.{x.layer_number - 1}." for n, x in enumerate(model.decoder.layers)
    }
    own = (config.num_moe_experts or 0) // config.expert_model_parallel_size
    first_expert = own * parallel_state.get_expert_model_parallel_rank()
    experts = {f"local_experts.{n}.": f"local_experts.{first_expert + n}." for n in range(own)}
    for name, weight in model.named_parameters():
        whole = name
        for numbers in (offset, experts):
            whole = next((whole.replace(a, b) for a, b in numbers.items() if a in whole), whole)
        draw(whole, weight)
    return model


def draw(name: str, weight: Any) -> None:
    split = parallel_state.get_tensor_model_parallel_world_size()
    split = split if getattr(weight, "tensor_model_parallel", False) else 1
    dim = weight.partition_dim if split > 1 else 0
    shape = [size * (split if axis == dim else 1) for axis, size in enumerate(weight.shape)]
    make = torch.Generator().manual_seed(sum(map(ord, name)))
    drawn = torch.randn(shape, generator=make) * 0.2
    if "norm" in name and name.endswith("weight"):
        drawn += 1
    rank = parallel_state.get_tensor_model_parallel_rank() if split > 1 else 0
    weight.data.copy_(drawn.chunk(split, dim)[rank])


def batches(step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and loss masks, whole; the masks leave more out on the right."""
    data = parallel_state.get_data_parallel_world_size()
    make = torch.Generator().manual_seed(10 + step)
    tokens = torch.randint(VOCAB, (MICRO * ROWS, SEQ_LEN + 1), generator=make)
    counted = (
        torch.rand(MICRO * ROWS, SEQ_LEN, generator=make) > torch.linspace(0, 1, SEQ_LEN)
    ).float()
    own = torch.arange(MICRO * ROWS).chunk(data)[parallel_state.get_data_parallel_rank()]
    for rows in own.chunk(MICRO):
        yield tokens[rows], counted[rows]


def forward(ring: MegatronRing, source: Iterator[tuple[Tensor, Tensor]], model: Any) -> Any:
    tokens, counted = next(source)
    sequence = ring.sequence(SEQ_LEN)
    positions = sequence.positions()[None]
    inputs, labels = (sequence.shard(x) for x in (tokens[:, :-1], tokens[:, 1:]))
    losses = model(inputs, positions.expand_as(inputs), None, labels=labels)
    return losses, partial(summed, sequence.shard(counted))


def summed(counted: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    total, count = (losses * counted).sum(), counted.sum()
    return total, count.int(), {"loss": torch.stack([total.detach(), count])}


def train(
    chunks: list[DistributedDataParallel],
    optimizer: Any,
    ring: MegatronRing,
    after: Callable[[list[DistributedDataParallel]], list[float]] = lambda _: [],
) -> list[float]:
    """Loss, norm of the gradient, and what `after` says, step for step."""
    told: list[float] = []
    for step in range(STEPS):
        for model in chunks:
            model.zero_grad_buffer()
        optimizer.zero_grad()
        with OnCpu():
            said = get_forward_backward_func()(
                forward_step_func=partial(forward, ring),
                data_iterator=[batches(step) for _ in chunks] if len(chunks) > 1 else batches(step),
                model=chunks if len(chunks) > 1 else chunks[0],
                num_microbatches=MICRO,
                seq_length=SEQ_LEN,
                micro_batch_size=ROWS // parallel_state.get_data_parallel_world_size(),
                forward_only=False,
            )
            _, norm, _ = optimizer.step()
        total = sum((part["loss"] for part in said), torch.zeros(2))
        dist.all_reduce(total)
        told += [(total[0] / total[1]).item(), norm, *after(chunks)]
    return told


def run(options: Options) -> list[float]:
    with OnCpu():
        chunks, optimizer, ring = build(options)
    return train(chunks, optimizer, ring)


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, {"ring": 2, "sharded": True}),
        (4, {"ring": 2, "sharded": True, "layout": "striped"}),
        (4, {"ring": 2, "pipeline": 2}),
        (4, {"ring": 2, "pipeline": 2, "virtual": 2}),
        (4, {"ring": 2, "tensor": 2, "sharded": True}),
        (
            2,
            {
                "ring": 2,
                "config": {
                    "recompute_granularity": "selective",
                    "recompute_modules": ["core_attn"],
                },
            },
        ),
        (
            2,
            {
                "ring": 2,
                "config": {
                    "recompute_granularity": "full",
                    "recompute_method": "uniform",
                    "recompute_num_layers": 1,
                },
            },
        ),
    ],
    ids=str,
)
def test_training_over_a_ring_equals_one_rank(
    world: Callable[[int], World], size: int, options: Options
) -> None:
    (wanted,) = world(1).run(run, {})
    for told in world(size).run(run, options):
        assert told == pytest.approx(wanted, rel=2e-6)


MOE = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_token_dispatcher_type": "allgather",
    "moe_router_load_balancing_type": "none",
    "add_bias_linear": False,
}


@pytest.mark.parametrize("experts", [2, 4])
def test_experts_may_live_on_the_ranks_of_a_ring(
    world: Callable[[int], World], experts: int
) -> None:
    (wanted,) = world(1).run(run, {"config": MOE})
    for told in world(4).run(run, {"ring": 2, "experts": experts, "config": MOE}):
        assert told == pytest.approx(wanted, rel=2e-6)


SINKS = {"softmax_type": "learnable", "window_size": (9, 0)}
SINK = "decoder.layers.0.self_attention.core_attention.softmax_offset"


def kept(options: Options) -> dict[str, tuple[Any, ...]]:
    """Where a rank's part of each weight lies in a checkpoint: whole shape, first element, copy."""
    with OnCpu():
        (model,), _, _ = build(options)
        held = model.module.sharded_state_dict()
    return {
        name: (part.key, part.global_shape, part.global_offset, part.replica_id)
        for name, part in held.items()
        if hasattr(part, "global_shape")
    }


def test_a_checkpoint_does_not_know_the_ring(world: Callable[[int], World]) -> None:
    (alone,) = world(1).run(kept, {"config": SINKS})
    ranks = world(4).run(kept, {"ring": 2, "tensor": 2, "layout": "striped", "config": SINKS})
    assert alone[SINK][1:3] == ((4, 4), (0, 0)), "layers are stacked in front of the heads"
    for rank, held in enumerate(ranks):
        assert held.keys() == alone.keys()
        assert {n: part[:2] for n, part in held.items()} == {n: p[:2] for n, p in alone.items()}
        assert held[SINK][2] == (0, 2 * (rank % 2))
    copies = [(held[SINK][2], held[SINK][3]) for held in ranks]
    assert len(set(copies)) == 4, "each copy has a number of its own, and one is the first"
