"""What a Trainer over a ring would train wrongly is refused by name."""

import tempfile
from collections.abc import Callable
from copy import copy
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import World
from ranks import groups, raised

pytest.importorskip("accelerate")
from hf_training import Rows, Run, Stream, arguments, as_a_rank, made
from transformers import Trainer

from ring_sp.integrations.huggingface import HuggingFaceRing, local_attention
from ring_sp.integrations.huggingface.arguments import refuse_trainer
from ring_sp.integrations.huggingface.trainer import RingTrainer

CHANGES: list[tuple[str, Any, str]] = [
    ("args._n_gpu", 2, "several GPUs in one process"),
    ("args.average_tokens_across_devices", False, "average_tokens_across_devices=False"),
    ("args.label_smoothing_factor", 0.1, "label_smoothing_factor"),
    ("args.neftune_noise_alpha", 5.0, "neftune_noise_alpha"),
    ("args.train_sampling_strategy", "batch_rebalance", "batch_rebalance"),
    ("args.torch_compile", True, "torch_compile"),
    ("args.use_liger_kernel", True, "use_liger_kernel"),
    ("args.include_for_metrics", ["inputs"], "include_for_metrics"),
    ("args.include_num_input_tokens_seen", "non_padding", "'non_padding'"),
    ("args.accelerator_config.split_batches", True, "split_batches"),
    ("args.accelerator_config.dispatch_batches", True, "dispatch_batches"),
    ("args.accelerator_config.even_batches", False, "even_batches=False"),
    ("accelerator", SimpleNamespace(parallelism_config=SimpleNamespace(cp_size=2)), "(cp_size=2)"),
    ("accelerator", SimpleNamespace(parallelism_config=SimpleNamespace(sp_size=2)), "(sp_size=2)"),
    (
        "args.hf_deepspeed_config",
        SimpleNamespace(config={"sequence_parallel_ring": {"size": 2}}),
        "sequence_parallel_ring in DeepSpeed's config",
    ),
    (
        "args.hf_deepspeed_config",
        SimpleNamespace(config={"tensor_parallel": {"autotp_size": 2}}),
        "tensor_parallel.autotp_size",
    ),
    ("compute_loss_func", print, "compute_loss_func"),
    ("compute_metrics", print, "compute_metrics"),
    ("model.config.output_router_logits", True, "output_router_logits"),
]
"""Attributes of a good Trainer, what they become, and what is said then."""


class OtherLoss(Trainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


class Mixed(RingTrainer, OtherLoss):
    pass


def changed(whole: Any, path: list[str], value: Any) -> Any:
    """A copy in which one attribute is another."""
    made = copy(whole)
    new = changed(getattr(whole, path[0]), path[1:], value) if len(path) > 1 else value
    setattr(made, path[0], new)
    return made


def said_of_changes() -> list[str]:
    ring = HuggingFaceRing(groups())
    with tempfile.TemporaryDirectory() as folder:
        good = made(Run(ring=1), folder)
        refuse_trainer(good, ring, RingTrainer)
        return [
            raised(refuse_trainer, changed(good, path.split("."), value), ring, RingTrainer)
            for path, value, _ in CHANGES
        ]


def test_arguments_that_a_ring_does_not_follow_are_refused(
    world: Callable[[int], World],
) -> None:
    for said in world(2).run(said_of_changes):
        for text, (path, _, words) in zip(said, CHANGES, strict=True):
            assert "a Trainer over a ring does not go with" in text and words in text, (path, text)


def said_of_parts() -> list[str]:
    """Of classes, rings and data that do not go together."""
    as_a_rank()
    ring = HuggingFaceRing(groups(ring=2))
    with tempfile.TemporaryDirectory() as folder:
        good = made(Run(ring=2), folder)
        parts: dict[str, Any] = {
            "model": good.model,
            "args": arguments(Run(), folder),
            "ring": ring,
        }
        rows = Stream(Rows(Run(), 1, 4))
        stream = {**parts, "train_dataset": rows, "eval_dataset": rows}
        config = {"max_steps": 2, "accelerator_config": {"dispatch_batches": False}}
        streaming = {**stream, "args": arguments(Run(options=config), folder)}
        return [
            raised(RingTrainer, **{**parts, "ring": HuggingFaceRing(groups(tensor=2))}, **sets()),
            raised(Mixed, **parts, **sets()),
            raised(
                RingTrainer, **{**stream, "args": arguments(Run(options={"max_steps": 2}), folder)}
            ),
            raised(RingTrainer(**streaming).evaluate),
            raised(RingTrainer(**parts, **sets()).predict, Rows(Run(), 1, 4)),
            raised(RingTrainer(**parts, **sets(labels=False)).train),
            locally(RingTrainer(**parts, **sets())),
        ]


def locally(trainer: RingTrainer) -> str:
    with local_attention(trainer.model):
        return raised(trainer.evaluate)


def sets(labels: bool = True) -> dict[str, Any]:
    rows = Rows(Run(), 1, 4)
    if not labels:
        rows.rows = [{"input_ids": row["input_ids"]} for row in rows.rows]
    return {"train_dataset": rows, "eval_dataset": rows}


def test_classes_rings_and_data_that_do_not_go_together_are_refused(
    world: Callable[[int], World],
) -> None:
    words = [
        "the ring and its data ranks are 1 ranks, the world has 2",
        "compute_loss of OtherLoss",
        "dispatch_batches: set accelerator_config={'dispatch_batches': False}",
        "an IterableDataset to evaluate on",
        "the logits of a ring's batch lie on several ranks",
        "the loss needs labels in the batch",
        "the model's attention is 'sdpa'",
    ]
    for said in world(2).run(said_of_parts):
        for text, word in zip(said, words, strict=True):
            assert word in text, (word, text)
