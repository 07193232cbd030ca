"""Pretrain a GPT of its own under DeepSpeed, its sequences spread over a ring; gloo or NCCL.

    torchrun --nproc_per_node 4 examples/deepspeed/pretrain_gpt.py \\
        --deepspeed_config examples/deepspeed/ds_config.json

The ring is the block "sequence_parallel_ring" of the config; with size 1, 2 or 4 the losses agree.
"""

import argparse
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from loop import describe, start_ranks, train
from text import VOCAB_SIZE, library_documents
from torch import Tensor, nn
from torch.nn import functional

from ring_sp import AttentionConfig, RingAttention, ShardedSequence
from ring_sp.integrations.deepspeed import initialize
from ring_sp.loss import shift_labels
from ring_sp.rotary import rotation


class Block(nn.Module):
    """Attention over the ring and SwiGLU, each after RMSNorm."""

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(config.dim) for _ in range(2))
        self.attention = RingAttention(config)
        self.up = nn.Linear(config.dim, 6 * config.dim, bias=False)
        self.down = nn.Linear(3 * config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, sequence: ShardedSequence) -> Tensor:
        part = self.norms[0](x), sequence
        config = self.attention.config
        turn = rotation(sequence, x, config.head_size, config.rotary_base)
        x = x + self.attention.attend(part, part, turn)
        gate, up = self.up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(functional.silu(gate) * up)


class GPT(nn.Module):
    """This rank's tokens [B, local_len] of a sequence to logits [B, local_len, vocab]."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        config = AttentionConfig(args.hidden_size, args.num_heads, args.num_kv_heads)
        self.embedding = nn.Embedding(VOCAB_SIZE, config.dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(config) for _ in range(args.num_layers))
        self.norm = nn.RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, VOCAB_SIZE, bias=False)

    def forward(self, tokens: Tensor, sequence: ShardedSequence) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, sequence)
        return self.head(self.norm(x))


def main() -> None:
    parser = deepspeed.add_config_arguments(argparse.ArgumentParser(description=__doc__))
    add = parser.add_argument
    add("--local_rank", type=int, default=-1, help="set by launchers")
    add("--num-layers", type=int, default=4)
    add("--hidden-size", type=int, default=128)
    add("--num-heads", type=int, default=4)
    add("--num-kv-heads", type=int, default=2)
    add("--seq-length", type=int, default=512)
    add("--train-iters", type=int, default=20)
    args = parser.parse_args()
    device = start_ranks()
    torch.manual_seed(1234)
    model = GPT(args)
    engine, *_ = initialize(args, model, model_parameters=model.parameters())
    describe(engine)

    def cut(tokens: Tensor) -> tuple[Any, Tensor]:
        sequence = engine.ring.sequence(tokens.shape[1])
        local, labels = (sequence.shard(x).to(device) for x in (tokens, shift_labels(tokens)))
        return (local, labels, sequence), labels

    def loss_of(part: Any, labelled: Tensor | None) -> Tensor:
        tokens, labels, sequence = part
        loss: Tensor = engine.ring.loss(engine(tokens, sequence), labels, labelled)
        return loss

    train(engine, library_documents(), args.seq_length, args.train_iters, cut, loss_of)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
