"""Tiny models of transformers, built from configs, and what one process makes of a batch."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import (
    Gemma2ForCausalLM,
    GptOssForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2MoeForCausalLM,
    Qwen3ForCausalLM,
)

VOCAB = 61
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
ALTERNATING = ["sliding_attention", "full_attention"]
MODELS: dict[str, Any] = {
    "Llama": LlamaForCausalLM,
    "Qwen3": Qwen3ForCausalLM,
    "Mistral": MistralForCausalLM,
    "Gemma2": Gemma2ForCausalLM,
    "GptOss": GptOssForCausalLM,
    "Qwen2Moe": Qwen2MoeForCausalLM,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"num_key_value_heads": 1},
    "Qwen3": {},
    "Mistral": {"sliding_window": 7},
    "Gemma2": {
        "sliding_window": 6,
        "layer_types": ALTERNATING,
        "attn_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 5,
    },
    "GptOss": {
        "sliding_window": 5,
        "layer_types": ALTERNATING,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
    },
    # Its layers know their window by the mask alone.
    "Qwen2Moe": {
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": ALTERNATING,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
}

Batch = dict[str, Tensor]


class InFloat64(TorchFunctionMode):
    """Lets models compute in float64 where they ask for float32, so that laws can be exact."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            return args[0].double()
        swap = {torch.float32: torch.float64}
        args = tuple(swap.get(x, x) if isinstance(x, torch.dtype) else x for x in args)
        named = {
            key: swap.get(x, x) if isinstance(x, torch.dtype) else x
            for key, x in (kwargs or {}).items()
        }
        return func(*args, **named)


@dataclass(frozen=True)
class Case:
    """A model, a batch for each data rank, and how they are spread over ranks."""

    family: str = "Llama"
    ring: int = 2
    ulysses: int = 1
    layout: str = "zigzag"
    seq_len: int = 27
    rows: int = 2
    cuts: tuple[int, ...] = ()
    """Of packed documents."""
    padded: bool = False
    checkpointing: bool = False
    dropout: float = 0.0

    def __str__(self) -> str:
        parts = [f"{self.family}-ring{self.ring}-{self.layout}"]
        parts += ["packed"] * bool(self.cuts) + ["padded"] * self.padded
        parts += [f"ulysses{self.ulysses}"] * (self.ulysses > 1)
        parts += ["checkpointing"] * self.checkpointing + ["dropout"] * bool(self.dropout)
        return "-".join(parts)


def exact() -> AbstractContextManager[Any]:
    """For building models and running them."""
    return InFloat64()


def built(case: Case, attention: str = "eager") -> PreTrainedModel:
    """The same model for every caller, in float64."""
    torch.manual_seed(5)
    kind = MODELS[case.family]
    shape = {**SHAPE, **FAMILIES[case.family], "attention_dropout": case.dropout}
    config = kind.config_class(**shape)
    if case.family in ("GptOss", "Qwen2Moe"):
        config._experts_implementation = "eager"
    model: PreTrainedModel = kind._from_config(config, attn_implementation=attention)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3 if weight.dim() > 1 else 1)
    if case.checkpointing:
        # Autograd recomputes outside of any mode that surrounds it.
        again = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), exact())}
        model.gradient_checkpointing_enable(again)
    return model.double().train()


def batch(case: Case, data_rank: int) -> Batch:
    """What a collator would give: data ranks have different numbers of labels."""
    make = torch.Generator().manual_seed(100 + data_rank)
    tokens = torch.randint(1, VOCAB, (case.rows, case.seq_len), generator=make)
    labels = tokens.clone()
    labels[:, : 3 + 2 * data_rank] = -100
    made = {"input_ids": tokens, "labels": labels}
    if case.cuts:
        lens = torch.tensor(case.cuts).diff()
        made["position_ids"] = torch.cat([torch.arange(int(n)) for n in lens])[None]
        labels[:, list(case.cuts[:-1])] = -100
    if case.padded:
        real = torch.ones_like(tokens)
        real[0, -6:] = 0
        real[-1, -2 - data_rank :] = 0
        made["attention_mask"] = real
        labels[real == 0] = -100
    return made


def labelled(case: Case, data_size: int) -> int:
    """Tokens with a loss in the batches of all data ranks."""
    return sum(int((batch(case, rank)["labels"][:, 1:] != -100).sum()) for rank in range(data_size))


def stock(case: Case, data_size: int) -> tuple[list[Tensor], Tensor, Batch]:
    """Logits of each data rank's batch, the mean loss over all, and its gradients; in one process,
    with transformers' own eager attention, masks and loss, each document by itself (gpt-oss of
    transformers 5.17 forgets its packing).
    """
    count, logits, loss = torch.tensor(labelled(case, data_size)), [], torch.zeros(()).double()
    with exact():
        model = built(case)
        for rank in range(data_size):
            whole, parts = batch(case, rank), []
            for start, stop in pairwise(case.cuts or (0, case.seq_len)):
                own = {key: x[:, start:stop] for key, x in whole.items()}
                out = model(**own, num_items_in_batch=count, use_cache=False)
                out.loss.backward()
                parts.append(out.logits.detach())
                loss += out.loss.detach()
            logits.append(torch.cat(parts, 1))
    return logits, loss, gradients(model)


def gradients(model: torch.nn.Module) -> Batch:
    """Of every weight. A weight without one fails the caller."""
    found = {}
    for name, weight in model.named_parameters():
        assert weight.grad is not None, f"{name} has no gradient"
        found[name] = weight.grad
    return found
