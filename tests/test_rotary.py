import pytest
import torch

from ring_sp import ShardedSequence
from ring_sp.layout import LAYOUTS
from ring_sp.ring import Axis
from ring_sp.rotary import rotation
from ring_sp.topology import Topology


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotary_turns_by_the_global_position_in_high_precision(layout: str) -> None:
    seq = ShardedSequence(1 << 18, Topology(ring=Axis(2, 4), ulysses=Axis(1, 2)), layout=layout)
    got = rotation(seq, torch.zeros(1, dtype=torch.bfloat16), 6, 500000.0)
    assert got is not None and got[0].dtype == torch.float32
    wanted = torch.cos(seq.positions()[:, None] * 500000.0 ** -(torch.arange(3).double() / 3))
    assert (got[0][:, 0] - wanted).abs().max() < 1e-6
