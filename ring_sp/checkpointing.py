"""Checkpoints that recompute a stretch of the forward but not its attention (arXiv:1604.06174)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils import checkpoint as torch_checkpoint

from ring_sp.kept import Kept


@dataclass(frozen=True)
class Checkpointing:
    """What a model recomputes in backward: all of its layers, `every` of them a checkpoint. With
    `keep_attention` attention's (out, lse) are kept, and the ring is not gone round again. Raises
    ValueError for a number below 1.
    """

    every: int = 1
    keep_attention: bool = True
    offload: bool = False

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every is a number of layers, at least 1; got {self.every}")
        if self.offload:
            raise NotImplementedError("offload is not there yet")


def checkpoint(
    fn: Callable[..., Any], *args: Any, keep_attention: bool = True, **kwargs: Any
) -> Any:
    """fn(*args, **kwargs), run again in backward, but for the calls of `ring_attention` in it,
    whose (out, lse) are kept if `keep_attention`.

    It is torch.utils.checkpoint without reentrance: random numbers and autocast are those of the
    first run, and checkpoints may lie in one another. What torch.compile traces keeps attention by
    a policy of selective checkpointing, which is the same.
    """
    inside = torch_checkpoint.checkpoint
    if not torch.is_grad_enabled():
        return fn(*args, **kwargs)
    names = tuple(kwargs)  # torch keeps as they are what is named, and has names of its own.
    run = partial(_named, fn, names)
    given = *args, *kwargs.values()
    if not keep_attention:
        return inside(run, *given, use_reentrant=False)
    if torch.compiler.is_compiling():
        policy = partial(
            torch_checkpoint.create_selective_checkpoint_contexts,
            [torch.ops.ring_sp.attention.default],
        )
        return inside(run, *given, use_reentrant=False, context_fn=policy)
    return inside(partial(_again, Kept(), run), *given, use_reentrant=False)


def _named(fn: Callable[..., Any], names: tuple[str, ...], *given: Any) -> Any:
    """fn of `given`, the last of which have names."""
    plain = len(given) - len(names)
    return fn(*given[:plain], **dict(zip(names, given[plain:], strict=True)))


def _again(kept: Kept, run: Callable[..., Any], *given: Any) -> Any:
    with kept.replaying() if kept.recorded else kept.recording():
        return run(*given)
