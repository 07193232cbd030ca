"""transformers' Trainer over a ring."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import has_length

from ring_sp.integrations.huggingface.arguments import refuse_trainer
from ring_sp.integrations.huggingface.batch import RingBatch
from ring_sp.integrations.huggingface.loader import RingLoader, ring_parts
from ring_sp.integrations.huggingface.registration import NAME, use_ring_attention
from ring_sp.integrations.huggingface.ring import HuggingFaceRing
from ring_sp.integrations.huggingface.sharding import over_data_ranks

RUN_STRIDE = 0x5851F42D4C957F2D
"""Between the dropout seeds of runs."""


class RingTrainer(Trainer):
    """A Trainer whose sequences lie on the ranks of a ring; also a mixin, the first base:
    `class MyTrainer(RingTrainer, OtherTrainer)`.

    It trains as a stock Trainer of as many processes as there are data ranks: loss, gradient norm
    and evaluation loss are the same, and so are samples, steps and epochs;
    per_device_train_batch_size is of the whole sequences that a ring shares. Attention dropout
    follows the seed, the step and the data rank. Of what it logs, eval_steps_per_second alone is
    counted as if each rank had data of its own; in DeepSpeed's config, so is train_batch_size.
    """

    def __init__(self, *args: Any, ring: HuggingFaceRing, **kwargs: Any) -> None:
        """Arguments of Trainer, and a ring that together with data ranks fills the world; make it
        after TrainingArguments, which start torch.distributed.

        The model attends over the ring from now on; see `local_attention`. Raises
        NotImplementedError for what `refuse_trainer` names and models that cannot ring, and
        ValueError for a ring that leaves ranks out.
        """
        self.ring = ring
        self.model: Any
        super().__init__(*args, **kwargs)
        refuse_trainer(self, ring, RingTrainer)
        use_ring_attention(self.model)
        # compute_loss takes the count, whether or not the model does.
        self.model_accepts_loss_kwargs = True

    def call_model_init(self, trial: Any = None) -> PreTrainedModel:
        model: Any = super().call_model_init(trial)
        use_ring_attention(model)
        return model

    def get_train_dataloader(self) -> Any:
        """Whole batches, the same on all ranks of a ring; `get_batch_samples` cuts them, so that
        accelerate can skip those before a checkpoint.
        """
        return over_data_ranks(super().get_train_dataloader(), self.ring)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super().get_eval_dataloader(*args, **kwargs)
        return over_data_ranks(loader, self.ring, is_evaluation=True)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super().get_test_dataloader(*args, **kwargs)
        return over_data_ranks(loader, self.ring, is_evaluation=True)

    def get_total_train_batch_size(self, args: Any) -> int:
        """Samples of a step; a ring's ranks share theirs."""
        return super().get_total_train_batch_size(args) // self.ring.manager.size("sequence")

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> Any:
        """Parts of the next batches, and the labelled tokens of all ranks in them."""
        done = self.state.global_step * self.args.gradient_accumulation_steps
        seed = self.args.seed * RUN_STRIDE + done
        parts = map(_inputs, ring_parts(epoch_iterator, self.ring, seed=seed))
        return super().get_batch_samples(parts, num_batches, device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean over `num_items_in_batch` labelled tokens of all ranks, with the gradient that
        is right after all ranks' have been averaged. Raises ValueError without labels, and for a
        model whose attention is local, which would not see the other ranks' tokens.
        """
        attention = self.model.config.get_text_config()._attn_implementation
        if attention != NAME:
            raise ValueError(
                f"the batch lies on several ranks and the model's attention is {attention!r}: "
                f"leave `local_attention`, or call use_ring_attention(model)"
            )
        given = {key: x for key, x in inputs.items() if key not in ("labels", "shift_labels")}
        if inputs.get("shift_labels") is None or num_items_in_batch is None:
            raise ValueError(f"the loss needs labels in the batch; got {', '.join(inputs)}")
        outputs = model(**given)
        count = torch.as_tensor(num_items_in_batch)
        world_size = self.ring.manager.size("data_sequence")
        loss = self.ring.loss(outputs.logits, inputs["shift_labels"], world_size, count)
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Trainer's, for the loss. Raises NotImplementedError where logits are asked for."""
        if prediction_loss_only is None:
            prediction_loss_only = self.args.prediction_loss_only
        if not prediction_loss_only:
            raise NotImplementedError(
                "the logits of a ring's batch lie on several ranks: set prediction_loss_only=True, "
                "or predict with a stock Trainer, `with local_attention(model):`"
            )
        step = self.args.eval_batch_size * self.ring.manager.size("data")
        self.gather_function = _weighted(dataloader.dataset, step)
        loader: Any = _Parts(RingLoader(dataloader, self.ring))
        return super().evaluation_loop(loader, description, True, *args, **kwargs)


@dataclass(frozen=True)
class _Parts:
    """A loader as the evaluation loop needs it."""

    parts: RingLoader

    @property
    def dataset(self) -> Any:
        return self.parts.loader.dataset  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(_inputs, self.parts)

    def __len__(self) -> int:
        return len(self.parts)


def _inputs(part: RingBatch) -> dict[str, Any]:
    """A part as Trainer carries it; it looks for both names of labels."""
    if part.shift_labels is None:
        return part.inputs
    return {**part.inputs, "labels": part.shift_labels, "shift_labels": part.shift_labels}


def _weighted(dataset: Any, step: int) -> Callable[[Tensor], Tensor]:
    """In place of gathering losses, which are the same on all ranks: one of a step for each of its
    samples, so that their mean is that of one process with batches of `step`.
    """
    counts: Iterator[int] = repeat(step)
    if has_length(dataset):
        whole, rest = divmod(len(dataset), step)
        counts = chain(repeat(step, whole), [rest])

    def gather(losses: Tensor) -> Tensor:
        return losses[:1].repeat(next(counts))

    return gather
