"""Train a Llama or a Qwen3 from scratch with transformers' Trainer, its sequences over a ring.

    torchrun --nproc_per_node 1 examples/huggingface/train.py --losses runs/one.json
    torchrun --nproc_per_node 4 examples/huggingface/train.py --ring 2 --same-as runs/one.json

Nothing is downloaded: the text is the Python standard library's sources, one byte a token. On GPUs:
NCCL and bf16 arithmetic over fp32 weights; else gloo and fp32. What is left of the world after
ring ranks is data parallel, and the batch of a step stays the same.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainingArguments,
)

from ring_sp import ProcessGroupManager, attention_kept
from ring_sp.integrations.huggingface import HuggingFaceRing
from ring_sp.integrations.huggingface.trainer import RingTrainer
from ring_sp.layout import LAYOUTS

sys.path.append(str(Path(__file__).parents[1]))  # for text.py

from text import VOCAB_SIZE, Corpus, pack, train_and_validation

FAMILIES: dict[str, Any] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
TOLERANCE = 1e-4
"""Of losses in fp32, relative; steps add up what order of summation rounds differently."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--ring", type=int, default=1, help="ranks that share a sequence")
    add("--layout", choices=LAYOUTS, default="zigzag", help="who holds which tokens")
    add("--family", choices=FAMILIES, default="llama")
    add("--layers", type=int, default=4)
    add("--hidden-size", type=int, default=128)
    add("--seq-len", type=int, default=1024, help="tokens")
    add("--batch-size", type=int, default=4, help="sequences of a step, on all ranks")
    add("--steps", type=int, default=20)
    add("--lr", type=float, default=1e-3)
    add("--fp32", action="store_true", help="fp32 arithmetic on GPUs too")
    add("--gradient-checkpointing", action="store_true")
    add("--deepspeed", help="a DeepSpeed config; what the Trainer knows is 'auto' there")
    add("--output", default="runs/huggingface", help="folder for checkpoints")
    add("--losses", type=Path, help="JSON file to write the losses of each step to")
    add("--same-as", type=Path, help="such a file of another run, which must have the same losses")
    return parser.parse_args()


class Sequences(torch.utils.data.Dataset[Tensor]):
    """A corpus by number; the Trainer shuffles."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus

    def __len__(self) -> int:
        return self.corpus.num_sequences

    def __getitem__(self, number: int) -> Tensor:
        return self.corpus.rows(number, 1)[0]


def collate(rows: list[Tensor]) -> dict[str, Tensor]:
    """The documents of some sequences, packed into one row: whole, the Trainer cuts it."""
    tokens, cuts = pack(torch.stack(rows))
    return {"input_ids": tokens, "labels": tokens.clone(), "cu_seq_lens_q": torch.tensor(cuts)}


def build_model(args: argparse.Namespace) -> PreTrainedModel:
    """Its weights do not depend on the ranks."""
    config_type, model_type = FAMILIES[args.family]
    config = config_type(
        vocab_size=VOCAB_SIZE,
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // 32,
        num_key_value_heads=args.hidden_size // 64,
        head_dim=32,
        max_position_embeddings=args.seq_len,
    )
    torch.manual_seed(1234)
    model: PreTrainedModel = model_type(config)
    return model


def training_arguments(args: argparse.Namespace) -> TrainingArguments:
    """A step has as many sequences on any number of ranks. Also starts torch.distributed, where
    torchrun has started several processes.
    """
    on_gpu = torch.cuda.is_available()
    data_size = max(int(os.environ.get("WORLD_SIZE", "1")) // args.ring, 1)
    if args.batch_size % data_size:
        raise ValueError(f"--batch-size {args.batch_size} must be a multiple of {data_size} rings")
    accumulation = args.batch_size // data_size
    return TrainingArguments(
        output_dir=args.output,
        max_steps=args.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
        per_device_eval_batch_size=accumulation,
        learning_rate=args.lr,
        warmup_steps=5,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not on_gpu,
        bf16=on_gpu and not args.fp32,
        gradient_checkpointing=args.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": attention_kept},
        deepspeed=args.deepspeed,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=on_gpu,
        disable_tqdm=True,
    )


def differences(history: list[dict[str, float]], wanted: list[dict[str, float]]) -> list[float]:
    """Of losses and gradient norms step by step, relative."""
    if len(history) != len(wanted):
        raise ValueError(f"{len(history)} steps here, {len(wanted)} in the other run")
    return [
        abs(here[name] - there[name]) / abs(there[name])
        for here, there in zip(history, wanted, strict=True)
        for name in there
    ]


def main() -> None:
    args = parse_args()
    arguments = training_arguments(args)
    manager = ProcessGroupManager.build(ring=args.ring)
    training, validation = train_and_validation(args.seq_len, 1234)
    trainer = RingTrainer(
        model=build_model(args),
        args=arguments,
        ring=HuggingFaceRing(manager, args.layout),
        train_dataset=Sequences(training),
        eval_dataset=torch.utils.data.Subset(Sequences(validation), range(9)),
        data_collator=collate,
    )
    trainer.train()
    trainer.evaluate()
    if not trainer.is_world_process_zero():
        return
    names = ("loss", "grad_norm", "eval_loss")
    logs = trainer.state.log_history
    history = [{name: log[name] for name in names if name in log} for log in logs]
    history = [log for log in history if log]
    if args.losses:
        args.losses.parent.mkdir(parents=True, exist_ok=True)
        args.losses.write_text(json.dumps(history, indent=1))
    if args.same_as:
        worst = max(differences(history, json.loads(args.same_as.read_text())))
        if not worst < TOLERANCE:
            raise SystemExit(f"losses and gradient norms differ from {args.same_as} by {worst:.1e}")
        print(f"losses and gradient norms are those of {args.same_as}, within {worst:.1e}")


if __name__ == "__main__":
    main()
