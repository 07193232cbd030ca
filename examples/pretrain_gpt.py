"""Pretrain a Megatron-core GPT with its sequences spread over a ring.

    torchrun --nproc_per_node 4 examples/pretrain_gpt.py --sequence-parallel-ring 4
    torchrun --nproc_per_node 4 examples/pretrain_gpt.py --tensor-model-parallel-size 2 \\
        --sequence-parallel-ring 2 --save runs/demo --save-interval 50

On GPUs: NCCL and bf16 arithmetic over fp32 weights; else gloo and fp32. The arguments are
Megatron's; what is left of the world after tensor and ring ranks is data parallel.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checkpoint import load, save
from megatron.core import parallel_state
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from trainer import Trainer

from ring_sp.integrations.megatron import MegatronRing
from ring_sp.layout import LAYOUTS
from ring_sp.topology import grid_shape

RESUMED = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "seq_length",
    "global_batch_size",
    "train_iters",
    "lr",
    "min_lr",
    "lr_warmup_iters",
    "weight_decay",
    "clip_grad",
    "seed",
    "no_document_mask",
)
"""Arguments that say what is trained, on which tokens, at which rate: a resumed run keeps them."""


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {text}")
    return int(text)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--sequence-parallel-ring",
        type=positive,
        default=1,
        metavar="N",
        help="ranks of one sequence",
    )
    add("--ring-layout", choices=LAYOUTS, default="zigzag", help="who holds which tokens")
    add(
        "--ring-ulysses", type=positive, default=1, help="of the N ranks, trade heads among so many"
    )
    add("--ring-outer", type=positive, default=1, help="outer rings of a double ring")
    add("--ring-kernel", default="auto", help="attention kernel")
    add("--tensor-model-parallel-size", type=positive, default=1, metavar="T")
    add("--num-layers", type=positive, default=4)
    add("--hidden-size", type=positive, default=128)
    add("--num-attention-heads", type=positive, default=4)
    add("--num-query-groups", type=positive, default=2)
    add("--seq-length", type=positive, default=512, help="tokens of a training sequence")
    add("--micro-batch-size", type=positive, default=2, help="sequences packed into one pass")
    add("--global-batch-size", type=positive, default=4, help="sequences of a step, on all ranks")
    add("--train-iters", type=positive, default=100)
    add("--lr", type=float, default=2e-3)
    add("--min-lr", type=float, default=2e-4)
    add("--lr-warmup-iters", type=int, default=10)
    add("--weight-decay", type=float, default=0.1)
    add("--clip-grad", type=float, default=1.0)
    add("--seed", type=int, default=1234)
    add("--fp32", action="store_true", help="fp32 arithmetic on GPUs too")
    add("--no-document-mask", action="store_true", help="attend across document borders")
    add("--log-interval", type=positive, default=10)
    add("--eval-interval", type=positive, default=50)
    add("--eval-iters", type=positive, default=4)
    add("--save", type=Path, help="folder for checkpoints")
    add("--load", type=Path, help="folder to resume from")
    add("--save-interval", type=positive, default=50)
    add("--exit-interval", type=positive, help="stop at a multiple of this, as if interrupted")
    add("--loss-log", type=Path, help="JSON file for the losses and gradient norms of each step")
    return parser.parse_args()


def start_ranks(args: argparse.Namespace) -> tuple[torch.device, MegatronRing]:
    """torch.distributed, Megatron's groups, and the ring inside its context-parallel group."""
    cuda, device = torch.cuda.is_available(), torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend = "nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, device_id=device if cuda else None)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    ring, parts = args.sequence_parallel_ring, args.ring_ulysses * args.ring_outer
    if ring % parts:
        raise ValueError(
            f"--sequence-parallel-ring {ring} is not a multiple of outer x ulysses, {parts}"
        )
    grid_shape(dist.get_world_size(), {"ring": ring, "tensor": args.tensor_model_parallel_size})
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor_model_parallel_size, context_parallel_size=ring
    )
    return device, MegatronRing.from_group(
        parallel_state.get_context_parallel_group(),
        layout=args.ring_layout,
        kernel=args.ring_kernel,
        ulysses=args.ring_ulysses,
        outer=args.ring_outer,
    )


def train(args: argparse.Namespace, trainer: Trainer, first: int) -> list[dict[str, Any]]:
    """Steps `first` to the last one asked for, with a progress bar; what each of them measured."""
    history: list[dict[str, Any]] = []
    interval = args.exit_interval or args.train_iters
    last = min(args.train_iters, (first // interval + 1) * interval)
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=dist.get_rank() != 0) as progress:
        log = progress.print if dist.get_rank() == 0 else lambda _: None
        log(describe(args, trainer))
        task = progress.add_task("", total=args.train_iters, completed=first)
        for step in range(first + 1, last + 1):
            began = time.perf_counter()
            loss, norm = trainer.step(step - 1)
            rate = args.global_batch_size * args.seq_length / (time.perf_counter() - began)
            history.append({"step": step, "loss": loss, "grad_norm": norm})
            text = f"loss {loss:.4f}  gradient norm {norm:.3f}  {rate:,.0f} tokens/s"
            progress.update(task, advance=1, description=text)
            if step % args.log_interval == 0:
                log(f"step {step:5d}  {text}")
            if step % args.eval_interval == 0 or step == args.train_iters:
                history[-1]["validation_loss"] = validation = trainer.validate()
                log(f"step {step:5d}  validation loss {validation:.4f}")
            if args.save and (step % args.save_interval == 0 or step == last):
                save(args.save, step, trainer.model, trainer.optimizer, kept_arguments(args))
    return history


def describe(args: argparse.Namespace, trainer: Trainer) -> str:
    """What is about to be trained, on which ranks."""
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    tensor, ring = args.tensor_model_parallel_size, args.sequence_parallel_ring
    return (
        f"{dist.get_world_size()} ranks: tensor {tensor} x ring {ring} x data {trainer.data_size}, "
        f"{args.ring_layout}, {trainer.device.type}; {parameters / 1e6:.2f} M parameters a rank; "
        f"{trainer.train.num_sequences} sequences of {args.seq_length} tokens to train on"
    )


def kept_arguments(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in RESUMED}


def main() -> None:
    args = parse_args()
    device, ring = start_ranks(args)
    trainer = Trainer(args, ring, device)
    first = 0
    if args.load:
        first = load(args.load, trainer.model, trainer.optimizer, kept_arguments(args))
    history = train(args, trainer, first)
    if args.loss_log and dist.get_rank() == 0:
        args.loss_log.parent.mkdir(parents=True, exist_ok=True)
        args.loss_log.write_text(json.dumps(history, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
