"""The parts of the transformer that are its own; see test_modules and test_checkpointing."""

from ring_sp import AttentionConfig, RingTransformer


def test_the_width_of_the_feed_forward_may_be_no_multiple_of_the_models() -> None:
    model = RingTransformer(17, 1, AttentionConfig(dim=8, num_heads=2), ff_multiple=28 / 8)
    assert model.get_parameter("blocks.0.down.weight").shape == (8, 28)
