"""Ring attention inside Hugging Face transformers: `attn_implementation="ring_sp"`, and batches cut
for it. `trainer` has the Trainer over a ring, which needs accelerate besides.
"""

from ring_sp.integrations.huggingface.batch import RingBatch
from ring_sp.integrations.huggingface.chunked_loss import ChunkedLoss
from ring_sp.integrations.huggingface.feed_forward import use_blockwise
from ring_sp.integrations.huggingface.loader import RingLoader
from ring_sp.integrations.huggingface.registration import (
    NAME,
    Registration,
    local_attention,
    register,
    use_ring_attention,
)
from ring_sp.integrations.huggingface.ring import HuggingFaceRing, RingContext

__all__ = [
    "NAME",
    "ChunkedLoss",
    "HuggingFaceRing",
    "Registration",
    "RingBatch",
    "RingContext",
    "RingLoader",
    "local_attention",
    "register",
    "use_blockwise",
    "use_ring_attention",
]
