"""Time each attention kernel alone, forward and backward, against FlexAttention.

    torchrun --nproc_per_node 1 examples/benchmarks/kernels.py --seq-len 16384

Causal, batch 1, bf16, on one CUDA GPU; all take turns. TFLOP/s count 4 operations for the forward
and 10 for the backward a head, head dim and visible pair, whatever a kernel computes again; 2 for
`ring_sp.max_logits`, which --max-logits times too.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import peers
import torch
import torch.distributed as dist
from attention import HEAD_DIM, Case, milliseconds
from torch import Tensor

import ring_sp
from ring_sp.kernels import KERNELS

Make = Callable[[Case, int, torch.device], tuple[peers.Step, peers.Step]]
OPERATIONS = {"forward": 4, "backward": 10, "max_logits": 2}
"""A head, head dim and visible pair."""
BLOCK_MASK = 9
"""Bytes a pair of tokens that create_block_mask takes: a bool and, for its sums, an int64. At 128k
it ran out of an H200's 141 GB.
"""


def passes(
    forward: Callable[[], Tensor], trained: list[Tensor], dout: Tensor
) -> tuple[peers.Step, peers.Step]:
    """The forward, and the backward of a forward made once."""
    out = forward()
    return forward, lambda: torch.autograd.grad(out, trained, dout, retain_graph=True)


def drawn(case: Case, head_dim: int, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """q, k and v to be trained, and the cotangent; [1, S, H, D]."""
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    *trained, dout = peers.drawn(heads, case.seq_len, head_dim, device)
    return [x.requires_grad_() for x in trained], dout


def ours(
    name: str, case: Case, head_dim: int, device: torch.device
) -> tuple[peers.Step, peers.Step]:
    """A kernel of ring_sp, called by one rank that has the whole sequence."""
    (q, k, v), dout = drawn(case, head_dim, device)
    sequence = ring_sp.ShardedSequence(case.seq_len, ring_sp.Topology(), case.mask)
    attend = partial(ring_sp.ring_attention, q, k, v, sequence, kernel=name)
    return passes(attend, [q, k, v], dout)


def flex(case: Case, head_dim: int, device: torch.device) -> tuple[peers.Step, peers.Step]:
    """torch's FlexAttention, compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def causal(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    blocks = create_block_mask(causal, None, None, case.seq_len, case.seq_len, device=device)
    attend = torch.compile(partial(flex_attention, block_mask=blocks, enable_gqa=True))
    trained, dout = drawn(case, head_dim, device)
    q, k, v = (x.detach().transpose(1, 2).contiguous().requires_grad_() for x in trained)
    return passes(partial(attend, q, k, v), [q, k, v], dout.transpose(1, 2).contiguous())


def largest(case: Case, head_dim: int, device: torch.device) -> peers.Step:
    """What qk-clip and the logging of attention logits cost a layer."""
    (q, k, _), _ = drawn(case, head_dim, device)
    sequence = ring_sp.ShardedSequence(case.seq_len, ring_sp.Topology(), case.mask)
    return partial(ring_sp.max_logits, q, k, sequence)


def has_room(seq_len: int, device: torch.device) -> bool:
    """Whether FlexAttention's block mask can be made; prints why not."""
    needed, there = BLOCK_MASK * seq_len**2, torch.cuda.get_device_properties(device).total_memory
    if needed > there:
        print(
            f"FlexAttention              left out: its block mask takes {needed / 1e9:.0f} GB, the "
            f"GPU has {there / 1e9:.0f}",
            flush=True,
        )
    return needed <= there


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq-len", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=["flash4", "triton"])
    parser.add_argument("--max-logits", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = peers.start()
    case = Case("causal", args.seq_len, heads=args.heads, kv_heads=args.kv_heads)
    made: dict[str, Make] = {"FlexAttention": flex} if has_room(args.seq_len, device) else {}
    made |= {name: partial(ours, name) for name in args.kernels}
    steps: dict[str, peers.Step] = {}
    for name, make in made.items():
        both = make(case, args.head_dim, device)
        steps |= {f"{name}, {way}": x for way, x in zip(("forward", "backward"), both, strict=True)}
    if args.max_logits:
        steps["ring_sp, max_logits"] = largest(case, args.head_dim, device)
    found = milliseconds(steps, device, args.repeats)
    whole = case.flops * args.head_dim / HEAD_DIM
    rows = {}
    for name, turns in found.items():
        ms = median(max(each) for each in turns)
        share = OPERATIONS[name.split(", ")[1]] / 14
        rows[name] = {"ms": ms, "tflops": whole * share / ms / 1e9}
        print(f"{name:26} {ms:9.3f} ms {rows[name]['tflops']:8.0f} TFLOP/s", flush=True)
    facts = {"device": peers.device_name(device), "torch": torch.__version__, **vars(args)}
    if args.json:
        args.json.write_text(json.dumps({**facts, "rows": rows}, indent=1, default=str))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
