"""The feed-forward of a Hugging Face model by chunks of tokens."""

from functools import partial
from types import MethodType

from torch import Tensor, nn
from transformers import PreTrainedModel

from ring_sp import blockwise


def use_blockwise(model: PreTrainedModel, chunk: int) -> int:
    """Compute each dense feed-forward `chunk` tokens at a time, and again in backward; returns how
    many there are.

    In place: the modules keep their names, weights and hooks, so that checkpoints, ZeRO and FSDP
    see no difference. Raises ValueError for a chunk below 1, or a model without a feed-forward
    named `mlp`, or with one whose forward was replaced already; NotImplementedError for mixtures
    of experts, whose routers and losses look at all tokens: leave those to the host.
    """
    if chunk < 1:
        raise ValueError(f"chunk is a number of tokens, at least 1; got {chunk}")
    found = [module for name, module in model.named_modules() if name.split(".")[-1] == "mlp"]
    for module in found:
        if any("expert" in name for name, _ in module.named_modules()):
            raise NotImplementedError(
                f"{type(module).__name__} has experts, whose router looks at all tokens; only "
                f"dense feed-forwards are computed by chunks"
            )
        if "forward" in vars(module):
            raise ValueError(
                f"the forward of {type(module).__name__} was replaced already; call use_blockwise "
                f"once, and before others that replace it"
            )
    if not found:
        raise ValueError(f"{type(model).__name__} has no modules named mlp")
    for module in found:
        module.forward = MethodType(partial(_by_chunks, chunk=chunk), module)
    return len(found)


def _by_chunks(module: nn.Module, x: Tensor, *, chunk: int) -> Tensor:
    return blockwise(partial(type(module).forward, module), x, chunk)
