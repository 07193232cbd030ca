"""`attn_implementation="ring_sp"` for models of transformers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from ring_sp.integrations.huggingface.attention import attend, mask_of
from ring_sp.integrations.huggingface.refusals import refuse_model

NAME = "ring_sp"


@dataclass(frozen=True)
class Registration:
    """What transformers knows since `register`."""

    name: str
    attention: Callable[..., Any]
    mask: Callable[..., Any]


def register() -> Registration:
    """Make `attn_implementation="ring_sp"` known to transformers, in this process; a second call
    changes nothing.
    """
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask_of)
    return Registration(NAME, attend, mask_of)


def use_ring_attention(model: PreTrainedModel) -> Registration:
    """Register, and have `model` use it from now on, in place.

    Raises NotImplementedError for a model whose layers cannot ring.
    """
    refuse_model(model)
    made = register()
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise NotImplementedError(
            f"{type(model).__name__} does not take its attention from transformers' "
            f"AttentionInterface, through which a ring is reached"
        )
    return made


@contextmanager
def local_attention(
    model: PreTrainedModel, implementation: str | None = None
) -> Iterator[PreTrainedModel]:
    """Inside the `with` block `model` attends in this process alone, over whole sequences with
    transformers' own masks and caches: to evaluate or to generate.

    `implementation` is one that transformers has for the model; it raises ValueError if not. By
    default it is "sdpa", or "eager" for a model that sdpa cannot serve: transformers leaves out a
    softcap there.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation or _local(model))
    try:
        yield model
    finally:
        model.set_attn_implementation(before)


def _local(model: PreTrainedModel) -> str:
    softcap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    return "sdpa" if model._supports_sdpa and softcap is None else "eager"
