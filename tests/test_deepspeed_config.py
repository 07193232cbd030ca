"""What a DeepSpeed config may say of a ring, and what is refused on every rank."""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import World
from ranks import groups, raised

pytest.importorskip("transformers")
pytest.importorskip("deepspeed")
import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed_runs import Run, destroy, engine_of, model_of, sgd, start
from hf_models import batch, gradients
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import IterableDataset

from ring_sp import ShardedSequence, ring_attention
from ring_sp.integrations.deepspeed import NAME, RingBlock, RingMPU, initialize
from ring_sp.integrations.deepspeed.config import batch_sizes
from ring_sp.loss import shift_labels

MICRO, STEPS = "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


def test_the_block_is_read_and_its_mistakes_are_named() -> None:
    full = {"size": 4, "layout": "striped", "ulysses": 2, "outer": 1, "kernel": "reference"}
    assert RingBlock.from_config({NAME: full}) == RingBlock(4, "striped", 2, 1, "reference")
    assert RingBlock.from_config({NAME: {"size": 1}}) == RingBlock(1)
    refused: list[tuple[Any, str]] = [
        ([], 'at least a "size"'),
        ({}, 'at least a "size"'),
        ({"size": "auto"}, "size must be a whole number from 1 up; got 'auto'"),
        ({"size": True}, "size must be a whole number"),
        ({"size": 2.0}, "size must be a whole number"),
        ({"size": 0}, "size must be a whole number from 1 up"),
        ({"size": 4, "outer": 3}, "must divide the size, 4 ranks"),
        ({"size": 2, "layout": "auto"}, "layout must be one of"),
        ({"size": 2, "kernel": "fast"}, "kernel must be one of auto, "),
        ({"size": 2, "exchange": None}, "exchange must be one of messages, copies"),
        ({"size": 2, "ring": 2, "degree": 1}, "got also degree, ring"),
    ]
    for given, message in refused:
        assert message in raised(RingBlock.from_config, {NAME: given}), given
    assert "no block" in raised(RingBlock.from_config, {})


def test_batch_sizes_count_sequences() -> None:
    full = {"train_batch_size": 12, MICRO: 2, STEPS: 3}
    for left_out in (None, *full):
        given = {key: value for key, value in full.items() if key != left_out}
        assert batch_sizes(given, 2) == full
    assert batch_sizes({MICRO: 2}, 2) == {"train_batch_size": 4, MICRO: 2, STEPS: 1}
    assert batch_sizes({"train_batch_size": 4}, 2) == {"train_batch_size": 4, MICRO: 2, STEPS: 1}
    refused: list[tuple[dict[str, Any], str]] = [
        ({}, "needs train_batch_size or"),
        ({STEPS: 2}, "needs train_batch_size or"),
        ({**full, STEPS: 2}, "must be"),
        ({"train_batch_size": 5, MICRO: 2}, "x 2, the rings of this world"),
        ({"train_batch_size": 1}, "x 2, the rings of this world"),
        ({"train_batch_size": "auto"}, "got 'auto'"),
    ]
    for sizes, message in refused:
        assert message in raised(batch_sizes, sizes, 2), sizes


class Two(nn.Module):
    """Two models of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = model_of(Run()), model_of(Run())


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


def refused(directory: Path) -> list[tuple[str, str]]:
    """On this rank: what a call should say, and what it says."""
    start()
    config = Run(stage=3).host_config(2)
    path = directory / "ds_config.json"
    path.write_text("{}") if dist.get_rank() == 0 else None
    dist.barrier()
    args = argparse.Namespace(deepspeed_config=str(path), local_rank=-1)
    mamba, odd = model_of(Run()), model_of(Run())
    mamba.config.layer_types = ["linear_attention"]
    odd.config.num_attention_heads = 3
    ulysses = {**config, NAME: {"size": 2, "ulysses": 2}}
    only = {**config, NAME: {"size": 2, "layout": "zigzag" if dist.get_rank() else "striped"}}
    bad_rank = {**config, NAME: {"size": 2, "ulyses": 1}} if dist.get_rank() == 3 else config
    on = {"enabled": True}
    calls: list[tuple[str, dict[str, Any]]] = [
        ("one of config, config_params, args", {"config": None}),
        ("one of config, config_params, args", {"args": args}),
        ("no block", {"args": args, "config": None}),
        ("size 3 does not divide the 4 ranks", {"config": {**config, NAME: {"size": 3}}}),
        ("all ranks need the same", {"config": only}),
        ("ulyses", {"config": bad_rank}),
        ("leave out sequence_parallel_size", {"config": {**config, "sequence_parallel_size": 2}}),
        ("leave out data_parallel_size", {"config": {**config, "data_parallel_size": 2}}),
        ("leave out mpu", {"mpu": RingMPU(groups(ring=2))}),
        ("leave out mesh_param", {"mesh_param": (2, 2)}),
        ("manager has", {"manager": groups(ring=4)}),
        ("must be a torch.nn.Module", {"model": None}),
        ("no pipelines", {"model": PipelineModule([nn.Linear(2, 2)], num_stages=1)}),
        ("2 models of transformers", {"model": Two()}),
        ("no linear_attention layers", {"model": mamba}),
        ("query heads that 2 divides", {"model": odd, "config": ulysses}),
        ("__getitem__ and __len__", {"training_data": Stream()}),
        ("gradient_allreduce_op", {"config": {**config, "gradient_allreduce_op": "sum"}}),
        ("predivide_factor", {"config": {**config, "gradient_predivide_factor": 4.0}}),
        ("AutoTP", {"config": {**config, "tensor_parallel": {"autotp_size": 2}}}),
        ("deepcompile", {"config": {**config, "compile": {"deepcompile": True}}}),
        ("hybrid_engine", {"config": {**config, "hybrid_engine": on}}),
        ("data_efficiency", {"config": {**config, "data_efficiency": on}}),
        ("expert_parallel", {"config": {**config, "expert_parallel": on}}),
        ("zenflow", {"config": {**config, "zero_optimization": {"stage": 2, "zenflow": {}}}}),
    ]
    plain = model_of(Run())
    found = [
        (message, raised(initialize, **{"model": plain, "config": config, **given}))
        for message, given in calls
    ]
    assert plain.config._attn_implementation == "eager", "a refusal changes nothing"
    return found


def test_mistakes_are_refused_on_every_rank(world: Callable[[int], World], tmp_path: Path) -> None:
    for rank in world(4).run(refused, tmp_path):
        for message, said in rank:
            assert message in said, message


def test_a_left_over_mpu_is_refused(world: Callable[[int], World]) -> None:
    assert all("left from another engine" in said for said in world(4).run(after_an_mpu))


def after_an_mpu() -> str:
    """What the block says in a process whose earlier engine had an mpu."""
    engine = engine_of(Run(mpu=True))
    engine.destroy()
    said = raised(engine_of, Run(ring=4))
    deepspeed.utils.groups.mpu = None
    destroy(engine_of(Run(ring=4)))
    return said


def sampled() -> tuple[list[int], int, int]:
    """The samples that this rank draws, the number of its ring, and the length of its loader."""
    start()
    config = {**Run().host_config(2), "train_batch_size": 4, MICRO: 2}
    model, numbers = model_of(Run()), list(range(8))
    engine, optimizer, loader, _ = initialize(
        None, model, sgd(model), training_data=numbers, config=config, manager=groups(ring=2)
    )
    assert loader is engine.training_dataloader and optimizer is engine.optimizer
    drawn = list(loader.data_sampler)  # a rank of the pool may not start the loader's workers
    length = len(loader)
    destroy(engine)
    return drawn, engine.ring.manager.rank("data"), length


def test_the_ranks_of_a_ring_draw_the_same_samples(world: Callable[[int], World]) -> None:
    drawn = world(4).run(sampled)
    assert [rank for _, rank, _ in drawn] == [0, 0, 1, 1]
    assert drawn[0] == drawn[1] and drawn[2] == drawn[3]
    assert sorted(drawn[0][0] + drawn[2][0]) == list(range(8)) and drawn[0][2] == 2


def misused() -> list[str]:
    """What an engine's ring says to wrong calls."""
    run = Run(stage=1, accumulation=2)
    engine = engine_of(run)
    part = engine.ring.batch(batch(run.case, 0))
    logits = engine(**part.inputs).logits
    labels = part.shift_labels
    said = [raised(engine.ring.loss, logits, labels)]
    with torch.no_grad():
        said.append(raised(engine.ring.loss, logits, labels))
    said.append(raised(engine.ring.loss, logits, labels[:, 1:], torch.tensor(3)))
    assert (engine.train_batch_size(), engine.gradient_accumulation_steps()) == (8, 2)
    engine.set_train_batch_size(16)
    said.append(raised(engine.ring.loss, logits, labels, torch.tensor(3)))
    destroy(engine)
    return said


def test_wrong_calls_of_a_ring_are_named(world: Callable[[int], World]) -> None:
    for count, evaluated, shapes, sizes in world(4).run(misused):
        assert "needs count=engine.ring.count" in count and evaluated == ""
        assert "must speak of the same tokens" in shapes
        assert "build a new engine" in sizes


class Tiny(nn.Module):
    """A model that is not of transformers: each token sees the mean of what came before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)

    def forward(self, tokens: Tensor, sequence: ShardedSequence) -> Tensor:
        x = self.embedding(tokens)[:, :, None]
        return self.head(ring_attention(x, x, x, sequence)[:, :, 0])


def of_its_own(directory: Path) -> tuple[float, float]:
    """The loss of a model of its own and the norm of its gradient, from a config in a file."""
    start()
    path = directory / "ds.json"
    if dist.get_rank() == 0:
        path.write_text(json.dumps({MICRO: 1, NAME: {"size": 2, "layout": "striped"}}))
    dist.barrier()
    torch.manual_seed(3)
    model = Tiny()
    args = argparse.Namespace(deepspeed_config=str(path), local_rank=-1)
    engine, *_ = initialize(args, model, sgd(model), manager=groups(ring=2))
    assert args == argparse.Namespace(deepspeed_config=str(path), local_rank=dist.get_rank())
    tokens = own_tokens(engine.ring.manager.rank("data"))
    sequence = engine.ring.sequence(9)
    assert sequence is engine.ring.sequence(9)
    labels = sequence.shard(shift_labels(tokens))
    logits = engine(sequence.shard(tokens), sequence)
    engine.backward(engine.ring.loss(logits, labels))
    assert "engine.ring.sequence(seq_len)" in raised(engine.ring.batch, {"input_ids": tokens})
    whole = engine.ring.unshard(logits, sequence)
    assert torch.equal(sequence.shard(whole), logits) and whole.shape == (1, 9, 11)
    norm = torch.stack([x.square().sum() for x in gradients(model).values()]).sum().sqrt()
    loss = engine.ring.loss(logits, labels).item()
    destroy(engine)
    return loss, norm.item()


def own_tokens(data_rank: int) -> Tensor:
    return torch.arange(9)[None] * (data_rank + 2) % 11


def test_a_model_of_its_own_gets_sequences_and_the_loss(
    world: Callable[[int], World], tmp_path: Path
) -> None:
    torch.manual_seed(3)
    model = Tiny()
    losses = []
    for data_rank in range(2):
        tokens = own_tokens(data_rank)
        logits = model(tokens, ShardedSequence(9))[:, :-1]
        losses.append(functional.cross_entropy(logits[0], tokens[0, 1:]))
    loss = torch.stack(losses).mean()
    loss.backward()
    norm = torch.stack([x.square().sum() for x in gradients(model).values()]).sum().sqrt()
    for found in world(4).run(of_its_own, tmp_path):
        assert found == pytest.approx((loss.item(), norm.item()), rel=1e-5)
