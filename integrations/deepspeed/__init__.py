"""Ring attention inside DeepSpeed: one block in its config, and gradients that are exact in every
ZeRO stage.
"""

from ring_sp.integrations.deepspeed.averaging import gradient_divisor
from ring_sp.integrations.deepspeed.block import NAME, RingBlock
from ring_sp.integrations.deepspeed.initialization import host_config, initialize
from ring_sp.integrations.deepspeed.mpu import RingMPU
from ring_sp.integrations.deepspeed.ring import DeepSpeedRing

__all__ = [
    "NAME",
    "DeepSpeedRing",
    "RingBlock",
    "RingMPU",
    "gradient_divisor",
    "host_config",
    "initialize",
]
