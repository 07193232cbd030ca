"""A Hugging Face model whose feed-forward is computed by chunks is the same model."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from ringed import relative

pytest.importorskip("transformers")
from hf_models import VOCAB, Case, built, exact
from torch import Tensor, nn

from ring_sp.integrations.huggingface import use_blockwise


def gradients(model: Any, tokens: Tensor) -> list[Tensor]:
    """Logits, and the gradients of all weights under a random cotangent."""
    logits = model(tokens).logits
    make = torch.Generator().manual_seed(1)
    dout = torch.randn(logits.shape, generator=make, dtype=logits.dtype)
    return [logits.detach(), *torch.autograd.grad(logits, list(model.parameters()), dout)]


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_is_the_same_model(family: str) -> None:
    tokens = torch.randint(VOCAB, (2, 23))
    with exact():
        model = built(Case(family))
        names, wanted = list(model.state_dict()), gradients(model, tokens)
        most: list[int] = []
        for layer in model.model.layers:
            layer.mlp.up_proj.register_forward_hook(
                lambda _, given, __: most.append(given[0].shape[1])
            )
        assert use_blockwise(model, 5) == 2
        found = gradients(model, tokens)
    assert list(model.state_dict()) == names and max(most) == 5
    assert max(relative(mine, true) for mine, true in zip(found, wanted, strict=True)) < 1e-13


def test_a_copy_has_weights_of_its_own() -> None:
    with exact():
        model = built(Case("Llama"))
        use_blockwise(model, 5)
        other, tokens = deepcopy(model), torch.randint(VOCAB, (1, 9))
        nn.init.zeros_(other.model.layers[0].mlp.down_proj.weight)
        assert relative(other(tokens).logits.detach(), model(tokens).logits.detach()) > 1e-3


def test_refuses_what_looks_at_all_tokens_and_what_is_not_there() -> None:
    with exact():
        with pytest.raises(NotImplementedError, match=r"GptOss.* has experts"):
            use_blockwise(built(Case("GptOss")), 5)
        model = built(Case("Llama"))
    with pytest.raises(ValueError, match="at least 1; got 0"):
        use_blockwise(model, 0)
    use_blockwise(model, 5)
    with pytest.raises(ValueError, match="replaced already"):
        use_blockwise(model, 5)
    model.model.layers = nn.ModuleList()
    with pytest.raises(ValueError, match="no modules named mlp"):
        use_blockwise(model, 5)
