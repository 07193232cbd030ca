"""Seeds of attention dropout, alike on the ranks of a ring by construction."""

from hashlib import blake2b

import torch
from megatron.core.tensor_parallel.random import convert_cuda_rng_state, get_cuda_rng_tracker

STREAM = "ring-attention-dropout"
"""The name of our state among those of Megatron's tracker of random numbers."""


def next_seed(tensor_rank: int) -> int:
    """A seed that no other call has, in this process or at another tensor rank; as Megatron's own
    dropout, alike for all data ranks.

    It counts calls from the seed of torch's generator at the first, and draws from no generator:
    what else a rank may draw, such as a data loader of its own, changes nothing. The count lies in
    Megatron's tracker, in the form of a CUDA generator's state: so a recomputation, before which
    Megatron puts the tracker back, repeats the seed of its forward, and a checkpoint that is
    resumed goes on counting.
    """
    tracker = get_cuda_rng_tracker()
    states = tracker.states_
    first, count = torch.initial_seed() & ((1 << 63) - 1), 0
    if STREAM in states:
        first, count = convert_cuda_rng_state(states[STREAM]).view(torch.int64).tolist()
    # A new tensor in a new dictionary, as checkpoints keep the old ones and may recompute again;
    # CUDA's offsets are multiples of 4.
    following = torch.tensor([first, count + 4], dtype=torch.int64, device="cpu")
    tracker.states_ = {**states, STREAM: following.view(torch.uint8)}
    words = b"".join(word.to_bytes(8, "little") for word in (first, count, tensor_rank))
    return int.from_bytes(blake2b(words, digest_size=8).digest(), "little") >> 1
