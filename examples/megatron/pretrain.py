"""Pretrain a GPT with megatron.training (Megatron-core 0.19, Python 3.12) over a ring.

    torchrun --nproc_per_node 2 examples/megatron/pretrain.py --sequence-parallel-ring 2 ...

The arguments are Megatron's and the ring's; the same as running Megatron-LM's own pretrain_gpt.py
with `-m ring_sp.integrations.megatron`. Two calls of ring_sp do it: `add_ring_args` and `install`.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu, utils
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from torch import Tensor

from ring_sp.integrations.megatron import RingOptions, add_ring_args, install

Loss = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]


def get_batch(source: Iterator[dict[str, Tensor]], vp_stage: int | None) -> dict[str, Any]:
    """This rank's tokens; each rank reads the whole sequences and keeps its part of them."""
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(("tokens", "labels", "loss_mask", "position_ids"))
    batch = {name: part.cuda(non_blocking=True) for name, part in next(source).items()}
    group = mpu.get_context_parallel_group()
    cut: dict[str, Any] = utils.get_batch_on_this_cp_rank(batch, False, cp_group=group)
    return cut


def forward_step(source: Iterator[dict[str, Tensor]], model: Any) -> tuple[Tensor, Loss]:
    """Losses of a micro-batch's tokens, and how to sum them."""
    batch = get_batch(source, utils.get_attr_wrapped_model(model, "vp_stage"))
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return losses, partial(summed, batch["loss_mask"])


def summed(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The sum over this rank's tokens, their number, and both for the log."""
    counted = loss_mask.view(-1).float()
    total, count = (losses.view(-1).float() * counted).sum(), counted.sum()
    return total, count.int(), {"lm loss": torch.stack([total.detach(), count])}


def datasets(sizes: list[int], vp_stage: int | None = None) -> Any:
    """Training, validation and test data of --data-path, or --mock-data."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        tokenizer=build_tokenizer(args),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
    )
    kind = MockGPTDataset if args.mock_data else GPTDataset
    needed = partial(is_first_or_last_pipeline_stage, vp_stage)
    return BlendedMegatronDatasetBuilder(kind, sizes, needed, config).build()


def main() -> None:
    """Train as the command line says."""
    args = parse_and_validate_args(extra_args_provider=add_ring_args)
    options = RingOptions.from_args(args)
    if options is None:
        raise SystemExit("give --sequence-parallel-ring [N]; this example trains with the ring")
    install(options)
    datasets.is_distributed = True  # type: ignore[attr-defined]
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(config, datasets, ModelType.encoder_or_decoder, forward_step)


if __name__ == "__main__":
    main()
