"""Train a small language model on this file's own bytes, each sequence spread over all ranks.

torchrun --nproc_per_node 4 examples/minimal.py    # the same losses with 1 process or 2
"""

from pathlib import Path

import torch
import torch.distributed as dist

from ring_sp import AttentionConfig, ProcessGroupManager, RingTransformer
from ring_sp.loss import shift_labels

SEQ_LEN, BATCH, STEPS = 509, 4, 20


def main() -> None:
    use_cuda = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("nccl" if use_cuda else "gloo")
    if use_cuda:
        torch.cuda.set_device(dist.get_node_local_rank())
    device = torch.device("cuda" if use_cuda else "cpu")

    groups = ProcessGroupManager.build(ring=dist.get_world_size())
    torch.manual_seed(0)  # Every rank starts with the same parameters and draws the same batches.
    config = AttentionConfig(dim=64, num_heads=4, num_kv_heads=2)
    model = RingTransformer(256, 2, config, topology=groups.topology).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    text = torch.frombuffer(bytearray(Path(__file__).read_bytes()), dtype=torch.uint8).long()
    for step in range(STEPS):
        starts = torch.randint(len(text) - SEQ_LEN, (BATCH,)).tolist()
        tokens = torch.stack([text[start : start + SEQ_LEN] for start in starts]).to(device)
        loss = model(tokens, shift_labels(tokens))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if dist.get_rank() == 0:
            print(f"step {step:2d}  loss {loss.item():.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
