"""The loss of a causal model of transformers by chunks of tokens: logits are never whole."""

from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ring_sp import LinearLoss, linear_cross_entropy
from ring_sp.integrations.huggingface.ring import RingContext

MODELS = ("gemma2", "gpt_oss", "llama", "mistral", "qwen2", "qwen3")
"""Types of models whose logits are known to be those of their head, after a softcap if any."""


class ChunkedLoss(nn.Module):
    """A causal model whose result is its loss over a ring, for DDP, `fully_shard` or an engine to
    wrap in place of the model.
    """

    def __init__(self, model: PreTrainedModel, chunk: int | None = None) -> None:
        """`chunk` tokens at a time, by default as many as `LinearLoss` takes. The model is the same
        as before for other callers. Raises NotImplementedError for models that are not among
        `MODELS`, and heads that are no plain nn.Linear without bias; ValueError for a head whose
        forward was replaced already.
        """
        super().__init__()
        kind, head = model.config.model_type, model.get_output_embeddings()
        if kind not in MODELS:
            raise NotImplementedError(
                f"the chunked loss is known to be right for {', '.join(MODELS)}; got a {kind}, "
                f"whose logits may be scaled after the head"
            )
        if type(head) is not nn.Linear or head.bias is not None:
            raise NotImplementedError(
                f"the chunked loss needs a head that is an nn.Linear without bias; got {head}"
            )
        if "forward" in vars(head):
            raise ValueError("the forward of the model's head was replaced already")
        cap = getattr(model.config, "final_logit_softcapping", None)
        # The head's own call, so that ZeRO-3 and FSDP2 gather its weight.
        head.forward = MethodType(
            partial(_loss_or_logits, options=LinearLoss(cap, chunk=chunk)), head
        )
        self.model: Any = model

    def forward(
        self,
        shift_labels: Tensor,
        averaged_over: int = 1,
        count: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """The mean over the labelled tokens of all ranks, as `HuggingFaceRing.loss` of the logits:
        `shift_labels` [B, local_len] and `inputs` are of `ring.batch(batch)`. Collective over data
        and sequence ranks. Raises ValueError without `ring_sp` among the inputs.
        """
        context = inputs.get("ring_sp")
        if not isinstance(context, RingContext):
            raise ValueError(f"give the inputs of ring.batch(batch); got {', '.join(inputs)}")
        group = context.ring.manager.group("data_sequence")
        hidden = self.model.base_model(**inputs).last_hidden_state
        head = self.model.get_output_embeddings()
        loss: Tensor = head(
            hidden, shift_labels, group=group, averaged_over=averaged_over, count=count
        )
        return loss


def _loss_or_logits(
    head: nn.Linear, x: Tensor, labels: Tensor | None = None, *, options: LinearLoss, **means: Any
) -> Tensor:
    if labels is None:
        return nn.Linear.forward(head, x)
    return linear_cross_entropy(x, head.weight, labels, options=options, **means)
