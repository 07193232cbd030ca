"""What a step of RingTransformer holds, against what the layers' formulas say they need.

In units of one bf16 tensor of all tokens, [S, dim]. Of 8 heads with 2 key heads, x, q and out are 1
each, k and v together KV, lse is LSE; the feed-forward is FF wide.
"""

from typing import Any
from unittest import mock

import pytest
import torch
from live import LiveBytes

from ring_sp import AttentionConfig, Checkpointing, Offload, RingTransformer, masks, tokenwise
from ring_sp.loss import shift_labels

TOKENS, DIM, HEADS = 8192, 64, 8
UNIT = 2 * TOKENS * DIM
KV, LSE, FF = 0.5, 4 * HEADS / (2 * DIM), 3
ATTENTION = 1 + 1 + KV
"""What an attention needs in backward beside x, out and lse: the normed x, q, k and v."""
FEED_FORWARD = 1 + 1 + 2 * FF + FF
"""Of a feed-forward: its x, the normed one, what goes into the activation, and comes out."""
ACTIVATION = 3 * FF
"""While the activation's backward runs, the gradients of what it gets (two) and gives and one more
for work, in place of what it gave."""
PROJECTIONS = 1 + 1 + 3
"""In backward of an attention's: the normed x, q's gradient, which waits, and the gradients of the
normed x by k, by v and by both."""
SMALL = 0.75
"""Rotation, tokens and labels, gradients of weights, and what is of a piece or a chunk."""
CHUNKS = {"feed_forward_chunk": 128, "loss_chunk": 128}


def held(depth: int, saving: dict[str, Any]) -> tuple[float, float]:
    """Held between forward and backward, and the peak of both."""
    torch.manual_seed(0)
    rule = masks.documents(range(0, TOKENS + 1, 256))
    config = AttentionConfig(DIM, HEADS, num_kv_heads=2)
    module = RingTransformer(64, depth, config, mask=rule, **saving).bfloat16()
    if module.offload:
        module.offload = Offload(min_bytes=UNIT // 2)
    tokens = torch.randint(64, (1, TOKENS))
    with LiveBytes() as live, mock.patch.object(tokenwise, "PIECE", 128 * DIM):
        loss = module(tokens, shift_labels(tokens))
        between = live.now
        loss.backward()
    return between / UNIT, live.peak / UNIT


@pytest.mark.parametrize(
    ("saving", "layer", "work"),
    [
        ({}, 1 + ATTENTION + 1 + LSE + FEED_FORWARD, 1 + ACTIVATION),
        (
            {"checkpointing": Checkpointing(keep_attention=False)},
            1,
            1 + ATTENTION + 1 + LSE + FEED_FORWARD + ACTIVATION,
        ),
        (
            {"checkpointing": Checkpointing()},
            1 + 1 + LSE,
            1 + ATTENTION + FEED_FORWARD + ACTIVATION,
        ),
        # The gradient of a block's result, and of a feed-forward's x, and its x itself.
        (
            {"checkpointing": Checkpointing(), **CHUNKS},
            1 + 1 + LSE,
            1 + max(ATTENTION + 1 + 1, PROJECTIONS),
        ),
        # The first layer's attention and feed-forward's x, and the x of the second.
        (
            {"checkpointing": Checkpointing(every=2), **CHUNKS},
            1 / 2 + 1 + LSE,
            1 + ATTENTION + 1 + 1 + max(ATTENTION + 1 + 1, PROJECTIONS),
        ),
    ],
    ids=["nothing", "full", "kept", "kept, chunks", "every second, chunks"],
)
def test_a_step_holds_what_its_formulas_need(
    saving: dict[str, Any], layer: float, work: float
) -> None:
    (between, peak), (more_between, more_peak) = (held(depth, saving) for depth in (2, 4))
    assert (more_between - between) / 2 == pytest.approx(layer, abs=0.01)
    assert (more_peak - peak) / 2 == pytest.approx(layer, abs=0.01)
    # The last x and its gradient.
    assert 2 <= between - 2 * layer < 2 + SMALL
    assert work <= peak - 2 * layer < work + SMALL


def test_offloading_holds_no_more_on_the_device_for_more_layers() -> None:
    saving = {"checkpointing": Checkpointing(offload=True), **CHUNKS}
    (between, peak), (more_between, more_peak) = (held(depth, saving) for depth in (3, 5))
    # x and out of all layers but the last are in host memory, which is counted too; lse is small.
    assert (more_between - between) / 2 == pytest.approx(2 + LSE, abs=0.01)
    assert (more_peak - peak) / 2 == pytest.approx(2 + LSE, abs=0.01)
    # What the last layer keeps, as without an offload; and in backward what comes back ahead.
    assert 2 <= between - 3 * (2 + LSE) < 2 + SMALL
    work = 1 + ATTENTION + 1 + 1
    assert work + 2 <= peak - 3 * (2 + LSE) < work + 4 + SMALL
