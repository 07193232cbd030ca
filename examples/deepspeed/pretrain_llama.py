"""Pretrain a Llama or Qwen3 of transformers from scratch under DeepSpeed, over a ring.

    torchrun --nproc_per_node 4 examples/deepspeed/pretrain_llama.py
    torchrun --nproc_per_node 2 examples/deepspeed/pretrain_llama.py --preset 1b --bf16 \\
        --activation-checkpointing --seq-length 65536 --train-iters 5

Nothing is downloaded: the model is built from its config, the text is Python's own library, a byte
a token. Several --seq-length are trained one after the other, to see how far the memory goes.
"""

import argparse
from typing import Any

import torch
import torch.distributed as dist
from loop import describe, start_ranks, train
from text import VOCAB_SIZE, library_documents
from tiled import TiledLoss, mean_of
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config
from transformers import Qwen3ForCausalLM as Qwen3

from ring_sp.integrations.deepspeed import initialize
from ring_sp.layout import LAYOUTS

FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3),
}
PRESETS = {
    "tiny": {"layers": 2, "hidden": 128, "heads": 4, "kv_heads": 2, "ffn": 256, "vocab": 512},
    "1b": {"layers": 16, "hidden": 2048, "heads": 32, "kv_heads": 8, "ffn": 8192, "vocab": 32000},
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--family", choices=FAMILIES, default="llama")
    add("--preset", choices=PRESETS, default="tiny", help="sizes that the next six replace")
    add("--num-layers", type=int, dest="layers")
    add("--hidden-size", type=int, dest="hidden")
    add("--num-heads", type=int, dest="heads")
    add("--num-kv-heads", type=int, dest="kv_heads")
    add("--ffn-hidden-size", type=int, dest="ffn")
    add("--vocab-size", type=int, dest="vocab")
    add("--seq-length", type=int, nargs="+", default=[512], help="tokens; one after the other")
    add("--train-iters", type=int, default=10, help="steps at each length")
    add("--train-batch-size", type=int, help="sequences a step; by default one a ring")
    add("--sequence-parallel-ring", type=int, default=2, metavar="N", help="ranks of a sequence")
    add("--ring-layout", choices=LAYOUTS, default="zigzag")
    add("--ring-kernel", default="auto")
    add("--zero-stage", type=int, default=3)
    add("--lr", type=float, default=1e-3)
    add("--clip-grad", type=float, default=1.0)
    add("--bf16", action="store_true")
    add("--activation-checkpointing", action="store_true")
    add("--tiles", type=int, default=0, help="tiles of DeepSpeed's tiled loss and feed-forward")
    args = parser.parse_args()
    for name, size in PRESETS[args.preset].items():
        setattr(args, name, getattr(args, name) or size)
    if args.vocab < VOCAB_SIZE:
        parser.error(f"--vocab-size must be at least {VOCAB_SIZE}, a token for each byte")
    return args


def build(args: argparse.Namespace, device: torch.device) -> PreTrainedModel:
    """The same weights on every rank."""
    torch.manual_seed(1234)
    config_class, model_class = FAMILIES[args.family]
    config = config_class(
        num_hidden_layers=args.layers,
        hidden_size=args.hidden,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.hidden // args.heads,
        intermediate_size=args.ffn,
        vocab_size=args.vocab,
        max_position_embeddings=max(args.seq_length),
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        tie_word_embeddings=False,
    )
    with device:
        model: PreTrainedModel = model_class(config)
    if args.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def host_config(args: argparse.Namespace) -> dict[str, Any]:
    """What a ds_config.json would say."""
    ring, rings = args.sequence_parallel_ring, dist.get_world_size() // args.sequence_parallel_ring
    adam = {"lr": args.lr, "betas": [0.9, 0.95], "torch_adam": True}
    return {
        "train_batch_size": args.train_batch_size or rings,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": args.clip_grad,
        "optimizer": {"type": "AdamW", "params": adam},
        "bf16": {"enabled": args.bf16},
        "zero_optimization": {"stage": args.zero_stage},
        "sequence_parallel_ring": {
            "size": ring,
            "layout": args.ring_layout,
            "kernel": args.ring_kernel,
        },
    }


def main() -> None:
    args = parse_args()
    device = start_ranks()
    plain = build(args, device)
    model = TiledLoss(plain, args.tiles) if args.tiles else plain
    engine, *_ = initialize(
        model=model, model_parameters=model.parameters(), config=host_config(args)
    )
    describe(engine)

    def cut(tokens: Tensor) -> tuple[Any, Tensor]:
        tokens = tokens.to(device)
        part = engine.ring.batch({"input_ids": tokens, "labels": tokens})
        assert part.shift_labels is not None
        return part, part.shift_labels

    def loss_of(part: Any, labelled: Tensor | None) -> Tensor:
        if args.tiles:
            return mean_of(engine, engine(part.shift_labels, **part.inputs), labelled)
        loss: Tensor = engine.ring.loss(engine(**part.inputs).logits, part.shift_labels, labelled)
        return loss

    documents = library_documents()
    for seq_len in args.seq_length:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        train(engine, documents, seq_len, args.train_iters, cut, loss_of)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
