"""Runs of transformers' Trainer, stock in one process or over a ring, and what they log."""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from hf_models import SHAPE, VOCAB
from ranks import groups
from torch import Tensor
from transformers import (
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from ring_sp.integrations.huggingface import HuggingFaceRing
from ring_sp.integrations.huggingface.trainer import RingTrainer

LOGGED = ("loss", "grad_norm", "eval_loss", "epoch", "num_input_tokens_seen")


@dataclass(frozen=True)
class Run:
    """A run of a Trainer; `ring` 0 is the stock one."""

    ring: int = 0
    rows: int = 16
    batch: int = 1
    accumulation: int = 1
    eval_batch: int = 2
    padded: bool = False
    packed: bool = False
    layout: str = "zigzag"
    stream: bool = False
    dropout: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    """More TrainingArguments."""

    def __str__(self) -> str:
        named = {**asdict(self), **self.options}
        return "-".join(f"{k}{v}" for k, v in named.items() if v and k not in ("options", "layout"))


@dataclass(frozen=True)
class Outcome:
    """What a run logged, and the weights it ended with."""

    history: list[dict[str, float]]
    weights: dict[str, Tensor]
    counts: tuple[float, ...]
    """Steps, epochs, and samples over the time they took."""


class Stream(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """The same without a length."""

    def __init__(self, rows: "Rows") -> None:
        self.rows = rows.rows

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.rows)


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Texts of random tokens; many have few labels."""

    def __init__(self, run: Run, seed: int, count: int) -> None:
        make = torch.Generator().manual_seed(seed)
        self.rows = []
        for number in range(count):
            length = 9 + 5 * (number % 3) if run.packed else 23
            tokens = torch.randint(1, VOCAB, (length,), generator=make)
            row = {"input_ids": tokens, "labels": tokens.clone()}
            row["labels"][: number % 7] = -100
            if number % 4 == 3:
                row["labels"][:-2] = -100
            if run.padded:
                real = 23 - number % 5
                row["attention_mask"] = (torch.arange(23) < real).long()
                row["labels"][real:] = -100
            self.rows.append(row)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Any:
        return self.rows[number]


def as_a_rank() -> None:
    """Tell accelerate what torch.distributed knows already."""
    if dist.get_world_size() > 1:
        names = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank()}
        names["WORLD_SIZE"] = names["LOCAL_WORLD_SIZE"] = dist.get_world_size()
        os.environ.update({name: str(value) for name, value in names.items()})


def arguments(run: Run, folder: str) -> TrainingArguments:
    options = {
        "max_grad_norm": 0.05,
        "num_train_epochs": 2,
        "save_strategy": "no",
        **run.options,
    }
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=run.batch,
        per_device_eval_batch_size=run.eval_batch,
        gradient_accumulation_steps=run.accumulation,
        learning_rate=0.5,
        optim="sgd",
        logging_steps=1,
        eval_strategy="epoch",
        include_num_input_tokens_seen="all",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )


def made(run: Run, folder: str, kind: type[RingTrainer] = RingTrainer) -> Trainer:
    """A Trainer; the same model, data and order for every caller."""
    as_a_rank()
    torch.manual_seed(5)
    shape: dict[str, Any] = {**SHAPE, "attention_dropout": run.dropout}
    config = LlamaConfig(**shape)
    model = LlamaForCausalLM._from_config(config, attn_implementation="eager")
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3 if weight.dim() > 1 else 1)
    rows = Rows(run, 1, run.rows)
    given: dict[str, Any] = {
        "model": model,
        "args": arguments(run, folder),
        "train_dataset": Stream(rows) if run.stream else rows,
        "eval_dataset": Rows(run, 2, 5),
        "data_collator": DataCollatorWithFlattening() if run.packed else default_data_collator,
    }
    if not run.ring:
        return Trainer(**given)
    return kind(**given, ring=HuggingFaceRing(groups(ring=run.ring), run.layout))


def trained(run: Run) -> Outcome:
    """What a whole run gives."""
    with tempfile.TemporaryDirectory() as folder:
        return outcome(made(run, folder))


def outcome(trainer: Trainer, **options: Any) -> Outcome:
    done = trainer.train(**options)
    logs = [{k: x[k] for k in LOGGED if k in x} for x in trainer.state.log_history]
    model: Any = trainer.model
    weights = {name: x.detach().clone() for name, x in model.named_parameters()}
    samples = done.metrics["train_samples_per_second"] / done.metrics["train_steps_per_second"]
    counts = (trainer.state.global_step, trainer.state.max_steps, trainer.state.epoch, samples)
    return Outcome([x for x in logs if x], weights, counts)
