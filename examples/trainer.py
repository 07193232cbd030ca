"""Model, optimizer and data of one rank, and what a training step does with them."""

import argparse
import math
from collections.abc import Iterator
from contextlib import nullcontext

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_config import TransformerConfig
from text import VOCAB_SIZE, Corpus, pack, train_and_validation
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ring_sp import masks
from ring_sp.integrations.megatron import (
    MegatronRing,
    RingSequenceParams,
    use_ring_positions,
    with_ring_attention,
)
from ring_sp.loss import IGNORE, shift_labels, token_mean

PADDED_VOCAB_SIZE = math.ceil(VOCAB_SIZE / 64) * 64
"""So that 1, 2, 4, ... tensor ranks divide it, and train the same model."""

Batch = tuple[Tensor, Tensor, masks.Mask]
"""Whole tokens and labels [B, S] of a micro-batch, and its mask."""


def build_model(args: argparse.Namespace, ring: MegatronRing, device: torch.device) -> GPTModel:
    """A GPT of stock Megatron parts around the ring; its weights do not depend on the ranks."""
    torch.manual_seed(args.seed)
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        context_parallel_size=args.sequence_parallel_ring,
        use_cpu_initialization=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
    )
    model = GPTModel(
        config,
        with_ring_attention(get_gpt_layer_local_spec(normalization="RMSNorm"), ring),
        vocab_size=PADDED_VOCAB_SIZE,
        max_sequence_length=args.seq_length,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
    )
    use_ring_positions(model, ring)
    return model.to(device)


class Trainer:
    """Model, optimizer and data of one rank."""

    def __init__(self, args: argparse.Namespace, ring: MegatronRing, device: torch.device) -> None:
        self.args, self.ring, self.device = args, ring, device
        self.data_rank = parallel_state.get_data_parallel_rank()
        self.data_size = parallel_state.get_data_parallel_world_size()
        self.group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        rows = args.micro_batch_size * self.data_size
        if args.global_batch_size % rows:
            raise ValueError(
                f"--global-batch-size {args.global_batch_size} is not a multiple of "
                f"--micro-batch-size {args.micro_batch_size} x data ranks {self.data_size}"
            )
        self.model = build_model(args, ring, device)
        self.wrapped = DistributedDataParallel(
            self.model, process_group=self.group, broadcast_buffers=False
        )
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": args.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=args.lr,
            betas=(0.9, 0.95),
        )
        self.train, self.validation = train_and_validation(args.seq_length, args.seed)

    def step(self, step: int) -> tuple[float, float]:
        """One optimizer step; the loss before it (nats a token) and the norm of its gradient."""
        batches = list(self.batches(self.train, step))
        count = self.count(batches)
        loss = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with nullcontext() if last else self.wrapped.no_sync():
                part = self.loss(batch, count)
                part.backward()
            loss += part.detach()
        norm = self.clip_gradients()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item(), norm

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over the first `eval_iters` batches of the validation text, nats a token."""
        batches = [
            batch
            for number in range(self.args.eval_iters)
            for batch in self.batches(self.validation, number)
        ]
        count = self.count(batches)
        return sum(self.loss(batch, count).item() for batch in batches)

    def batches(self, corpus: Corpus, step: int) -> Iterator[Batch]:
        """This data rank's micro-batches of a step: whole tokens, whole labels, mask."""
        args = self.args
        own = args.global_batch_size // self.data_size
        rows = corpus.rows(step * args.global_batch_size + self.data_rank * own, own)
        for micro in rows.split(args.micro_batch_size):
            if args.no_document_mask:
                yield micro, shift_labels(micro), masks.causal()
            else:
                tokens, cu_seqlens = pack(micro)
                yield tokens, shift_labels(tokens, cu_seqlens), masks.documents(cu_seqlens)

    def count(self, batches: list[Batch]) -> Tensor:
        """Tokens with a label, over all data ranks: these labels are whole on every ring rank."""
        count = torch.stack([(labels != IGNORE).sum() for _, labels, _ in batches]).sum()
        count = count.to(self.device)
        dist.all_reduce(count, group=parallel_state.get_data_parallel_group())
        return count

    def loss(self, batch: Batch, count: Tensor) -> Tensor:
        """A micro-batch's share of the mean loss; its labels were shifted on the whole sequence."""
        tokens, labels, mask = batch
        sequence = self.ring.sequence(tokens.shape[1], mask)
        tokens, labels = (sequence.shard(x).to(self.device) for x in (tokens, labels))
        bf16 = self.device.type == "cuda" and not self.args.fp32
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            losses = self.wrapped(
                tokens,
                sequence.positions(self.device).expand_as(tokens),
                None,
                labels=labels.clamp_min(0),
                packed_seq_params=RingSequenceParams(sequence=sequence),
            )
        return token_mean(losses.float(), labels != IGNORE, self.group, self.group.size(), count)

    def clip_gradients(self) -> float:
        """Scale gradients to a norm of at most `clip_grad`, and return the norm they had."""
        tensor_group = parallel_state.get_tensor_model_parallel_group()
        split, whole = torch.zeros(2, dtype=torch.float64, device=self.device)
        gradients = []
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                gradients.append(parameter.grad)
                square = parameter.grad.double().square().sum()
                if getattr(parameter, "tensor_model_parallel", False):
                    split += square
                else:
                    whole += square
        dist.all_reduce(split, group=tensor_group)
        norm = (split + whole).sqrt().item()
        if norm > self.args.clip_grad:
            torch._foreach_mul_(gradients, self.args.clip_grad / norm)
        return norm

    def learning_rate(self, step: int) -> float:
        args = self.args
        if step < args.lr_warmup_iters:
            return args.lr * (step + 1) / args.lr_warmup_iters
        done = (step - args.lr_warmup_iters) / max(args.train_iters - args.lr_warmup_iters, 1)
        return args.min_lr + (args.lr - args.min_lr) * (1 + math.cos(math.pi * min(done, 1))) / 2
