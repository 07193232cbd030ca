"""What both examples do around their models: start ranks, read real text, step and print."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))
from text import Corpus

Loss = Callable[[Any, Tensor | None], Tensor]
"""The loss of a part of a batch; with the number of labels of a step that accumulates."""


def start_ranks() -> torch.device:
    """torch.distributed and this rank's device. On CPUs DeepSpeed would first compile an all-reduce
    of its own, for minutes; gloo's is good enough.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.simplefilter("ignore", FutureWarning)  # DeepSpeed's names of collectives
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
    return device


@dataclass(frozen=True)
class Step:
    """What a step measured."""

    loss: float
    norm: float
    seconds: float


def steps(
    engine: Any,
    corpus: Corpus,
    count: int,
    cut: Callable[[Tensor], tuple[Any, Tensor]],
    loss_of: Loss,
) -> Iterator[Step]:
    """`count` optimizer steps. `cut` takes whole tokens [B, S] to this rank's part of them and its
    labels.
    """
    size, rank = (getattr(engine.ring.manager, of)("data") for of in ("size", "rank"))
    rows, micros = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    for step in range(count):
        began = time.perf_counter()
        first = (step * size + rank) * rows * micros
        parts = [cut(corpus.rows(first + rows * micro, rows)) for micro in range(micros)]
        labelled = engine.ring.count(labels for _, labels in parts)
        total = torch.zeros((), device=labelled.device)
        for part, _ in parts:
            loss = loss_of(part, labelled)
            engine.backward(loss)
            engine.step()
            total += loss.detach()
        norm = engine.get_global_grad_norm()
        yield Step(total.item(), float("nan") if norm is None else float(norm), clock(began))


def clock(began: float) -> float:
    """Seconds since then, once the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def train(
    engine: Any,
    documents: Sequence[bytes],
    seq_len: int,
    count: int,
    cut: Callable[[Tensor], tuple[Any, Tensor]],
    loss_of: Loss,
) -> None:
    """`count` steps on real text in sequences of `seq_len` tokens; rank 0 prints."""
    corpus = Corpus(documents, seq_len, seed=1234)
    tokens = engine.train_batch_size() * seq_len
    for number, step in enumerate(steps(engine, corpus, count, cut, loss_of), 1):
        text = f"{seq_len} tokens, step {number}: loss {step.loss:.6f}  "
        text += f"gradient norm {step.norm:.6f}  {tokens / step.seconds:,.0f} tokens/s"
        if torch.cuda.is_available():
            text += f"  peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        if dist.get_rank() == 0:
            print(text, flush=True)


def describe(engine: Any) -> None:
    """Rank 0 prints what is about to be trained, on which ranks."""
    block, rings = engine.ring.block, engine.ring.manager.size("data")
    weights = sum(getattr(x, "ds_numel", x.numel()) for x in engine.module.parameters())
    if dist.get_rank() == 0:
        print(
            f"{dist.get_world_size()} ranks: ring {block.size} x data {rings}, {block.layout}, "
            f"ZeRO stage {engine.zero_optimization_stage()}; {weights / 1e6:.2f} M parameters; "
            f"{engine.train_batch_size()} sequences a step",
            flush=True,
        )
