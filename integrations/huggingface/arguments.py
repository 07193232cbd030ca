"""What of Trainer would train something else over a ring, said before it starts."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset
from transformers import Trainer

from ring_sp.integrations.huggingface.ring import HuggingFaceRing

OWN = ("compute_loss", "training_step", "prediction_step", "get_batch_samples", "evaluation_loop")
"""Methods in which another class would train or evaluate in a way that a ring does not know."""
DEEPSPEED_SIZES = ("sequence_parallel_size", "data_parallel_size", "sequence_parallel_ring")
"""Of a DeepSpeed config; a Trainer's ring is all that spreads sequences."""


def refuse_trainer(trainer: Any, ring: HuggingFaceRing, base: type) -> None:
    """Raise NotImplementedError for what a ring does not do in a Trainer, all of it at once, and
    ValueError for a ring that does not fill the world with its data ranks.

    `base` is the class whose methods cut batches and compute losses.
    """
    args = trainer.args
    size = ring.manager.size("data_sequence")
    if size != args.world_size:
        raise ValueError(
            f"the ring and its data ranks are {size} ranks, the world has {args.world_size}: build "
            f"the ProcessGroupManager after TrainingArguments, without tensor or pipeline ranks"
        )
    found = [*_of_arguments(args), *_of_accelerate(trainer, ring), *_of_trainer(trainer, base)]
    if found:
        raise NotImplementedError(f"a Trainer over a ring does not go with {'; '.join(found)}")


def _of_arguments(args: Any) -> Iterator[str]:
    if args.n_gpu > 1:
        yield "several GPUs in one process: start one for each with torchrun"
    if not args.average_tokens_across_devices and args.world_size > 1:
        yield "average_tokens_across_devices=False: the mean is over the tokens of all ranks"
    if args.label_smoothing_factor:
        yield "label_smoothing_factor: set it to 0"
    if args.neftune_noise_alpha is not None:
        yield "neftune_noise_alpha, whose noise follows the number of tokens on a rank"
    if args.train_sampling_strategy == "batch_rebalance":
        yield "train_sampling_strategy='batch_rebalance', which deals batches to all ranks"
    if args.use_liger_kernel:
        yield "use_liger_kernel, whose loss does not know a ring"
    if args.torch_compile:
        yield "torch_compile, which was not tried"
    if args.include_for_metrics:
        yield "include_for_metrics: evaluation has the loss alone"
    if args.include_num_input_tokens_seen == "non_padding":
        yield "include_num_input_tokens_seen='non_padding': masks do not travel, count 'all'"


def _of_accelerate(trainer: Any, ring: HuggingFaceRing) -> Iterator[str]:
    config = trainer.args.accelerator_config
    is_iterable = isinstance(trainer.train_dataset, IterableDataset)
    if config.split_batches:
        yield "split_batches: say per_device_train_batch_size"
    if config.dispatch_batches or (is_iterable and config.dispatch_batches is None):
        yield "dispatch_batches: set accelerator_config={'dispatch_batches': False}"
    if not config.even_batches and ring.manager.size("data") > 1:
        yield "even_batches=False: data ranks would take different numbers of steps"
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    sizes = {name: getattr(parallelism, f"{name}_size", 1) for name in ("cp", "sp", "tp")}
    if wide := [f"{name}_size={size}" for name, size in sizes.items() if size > 1]:
        yield f"ParallelismConfig({', '.join(wide)}): the ring is given to RingTrainer alone"
    deepspeed = getattr(trainer.args, "hf_deepspeed_config", None)
    given = {} if deepspeed is None else deepspeed.config
    if named := [name for name in DEEPSPEED_SIZES if name in given]:
        yield f"{', '.join(named)} in DeepSpeed's config: the ring is given to RingTrainer alone"
    if given.get("tensor_parallel", {}).get("autotp_size", 1) > 1:
        yield "tensor_parallel.autotp_size in DeepSpeed's config"


def _of_trainer(trainer: Any, base: type) -> Iterator[str]:
    for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
        if getattr(trainer, name) is not None:
            yield f"{name}, which would see the logits of one rank's tokens"
    text = trainer.model.config.get_text_config()
    if getattr(text, "output_router_logits", False):
        yield "output_router_logits: the balance of experts is over all tokens of a batch"
    order = type(trainer).__mro__
    for kind in order[order.index(base) + 1 : order.index(Trainer)]:
        if own := [name for name in OWN if name in vars(kind)]:
            yield f"{', '.join(own)} of {kind.__name__}"
