import pickle
from collections.abc import Callable

import torch
from conftest import World
from ranks import sequence

from ring_sp import layout


def packed_round_trip() -> bool:
    seq = sequence({"ring": 2, "ulysses": 2}, 24, layout=layout.ZigzagDocuments((0, 8, 24)))
    x = torch.arange(48.0).view(2, 24)
    again = pickle.loads(pickle.dumps(seq.layout))
    held = [[p for span in shard for p in span] for shard in seq.shards]
    return (
        torch.equal(seq.unshard(seq.shard(x)), x)
        and again == seq.layout
        and held
        == [
            [0, 1, 6, 7, 8, 9],
            [10, 11, 20, 21, 22, 23],
            [2, 3, 4, 5, 12, 13],
            [14, 15, 16, 17, 18, 19],
        ]
    )


def test_ulysses_peers_share_the_zigzag_shards_of_documents(world: Callable[[int], World]) -> None:
    assert all(world(4).run(packed_round_trip))
