from unittest import mock

import pytest
import torch
from ringed import relative

from ring_sp import ShardedSequence, tokenwise
from ring_sp.layout import LAYOUTS
from ring_sp.ring import Axis
from ring_sp.rotary import rotate, rotation
from ring_sp.topology import Topology


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotary_turns_by_the_global_position_in_high_precision(layout: str) -> None:
    seq = ShardedSequence(1 << 18, Topology(ring=Axis(2, 4), ulysses=Axis(1, 2)), layout=layout)
    got = rotation(seq, torch.zeros(1, dtype=torch.bfloat16), 6, 500000.0)
    assert got is not None and got[0].dtype == torch.float32
    wanted = torch.cos(seq.positions()[:, None] * 500000.0 ** -(torch.arange(3).double() / 3))
    assert (got[0][:, 0] - wanted).abs().max() < 1e-6


@pytest.mark.parametrize("tokens", [1, 3, 11, 100])
def test_rotate_turns_pairs_by_pieces_and_its_gradient_turns_back(tokens: int) -> None:
    torch.manual_seed(0)
    x, dout = torch.randn(2, 2, 11, 3, 6, dtype=torch.float64)
    by = rotation(ShardedSequence(11), x, 6, 100.0)
    assert by is not None
    x.requires_grad_()
    with mock.patch.object(tokenwise, "PIECE", tokens * 2 * 3 * 6):
        out = rotate(x, by)
        (found,) = torch.autograd.grad(out, x, dout)
    # A pair is a complex number.
    turn = torch.complex(*by)
    wanted = torch.view_as_real(torch.complex(*x.detach().chunk(2, -1)) * turn)
    back = torch.view_as_real(torch.complex(*dout.chunk(2, -1)) * turn.conj())
    assert relative(out.detach(), torch.cat(wanted.unbind(-1), -1)) < 1e-15
    assert relative(found, torch.cat(back.unbind(-1), -1)) < 1e-15
