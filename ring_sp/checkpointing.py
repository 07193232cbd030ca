"""Checkpoints that recompute a stretch of the forward but not its attention (arXiv:1604.06174)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils import checkpoint as torch_checkpoint

from ring_sp.kept import Hold, Kept, current, hold
from ring_sp.layout import whole_number
from ring_sp.offload import Offload, Stretch


@dataclass(frozen=True)
class Checkpointing:
    """What a model recomputes in backward: all of its layers, `every` of them a checkpoint. With
    `keep_attention` attention's (out, lse) are kept, and the ring is not gone round again; with
    `offload`, layers' inputs and what is kept of attention lie in host memory until their backward
    comes near. Raises ValueError for a number below 1, and values of other types.
    """

    every: int = 1
    keep_attention: bool = True
    offload: bool = False

    def __post_init__(self) -> None:
        if whole_number("every", self.every) < 1:
            raise ValueError(f"every is a number of layers, at least 1; got {self.every}")
        for name in ("keep_attention", "offload"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False; got {getattr(self, name)!r}")


def checkpoint(
    fn: Callable[..., Any],
    *args: Any,
    keep_attention: bool = True,
    offload: Offload | None = None,
    **kwargs: Any,
) -> Any:
    """fn(*args, **kwargs), run again in backward, but for the calls of `ring_attention` in it,
    whose (out, lse) are kept if `keep_attention`. With an `offload` they are kept in host memory,
    and so are the tensors among the arguments that were computed and need a gradient.

    It is torch.utils.checkpoint without reentrance: random numbers and autocast are those of the
    first run, and checkpoints may lie in one another. What torch.compile traces keeps attention by
    a policy of selective checkpointing, which is the same. Raises ValueError for an offload inside
    another checkpoint, which keeps for it, and NotImplementedError for one that is traced.
    """
    if not torch.is_grad_enabled():
        return fn(*args, **kwargs)
    names = tuple(kwargs)  # torch keeps as they are what is named, and has names of its own.
    run: Callable[..., Any] = partial(_named, fn, names)
    given = [*args, *kwargs.values()]
    inside = partial(torch_checkpoint.checkpoint, use_reentrant=False)
    keeping = attention_kept
    if offload is not None:
        if torch.compiler.is_compiling():
            raise NotImplementedError("offload cannot be compiled: compile what it checkpoints")
        if current():
            raise ValueError("a checkpoint in another keeps nothing itself: offload the outer one")
        stretch = offload.open()
        keeping = partial(attention_kept, stretch.keep)
        run, given = _travelling(stretch, run, given)
    return inside(run, *given, context_fn=keeping) if keep_attention else inside(run, *given)


def attention_kept(hold: Hold = hold) -> tuple[Any, Any]:
    """For `context_fn` of torch.utils.checkpoint without reentrance, and of hosts that hand it on:
    a checkpoint runs again all but the calls of `ring_attention` in it, whose (out, lse) are kept.
    """
    # Before torch 2.13 `is_compiling` does not last until the compiler asks for this.
    if torch.compiler.is_compiling() or get_proxy_mode() is not None:
        kept_operators = [torch.ops.ring_sp.attention.default]
        return torch_checkpoint.create_selective_checkpoint_contexts(kept_operators)
    kept = Kept(hold)
    return kept.recording(), _Replaying(kept)


class _Replaying:
    """`kept.replaying()`, as often as backward comes."""

    def __init__(self, kept: Kept) -> None:
        self._kept = kept

    def __enter__(self) -> None:
        self._now = self._kept.replaying()
        self._now.__enter__()

    def __exit__(self, *raised: Any) -> bool | None:
        return self._now.__exit__(*raised)


def _named(fn: Callable[..., Any], names: tuple[str, ...], *given: Any) -> Any:
    """fn of `given`, the last of which have names."""
    plain = len(given) - len(names)
    return fn(*given[:plain], **dict(zip(names, given[plain:], strict=True)))


def _travelling(
    stretch: Stretch, run: Callable[..., Any], given: list[Any]
) -> tuple[Callable[..., Any], list[Any]]:
    """`run`, and what it is given, with what `stretch` keeps of it: at first it is used as it came,
    in backward as it comes back.
    """
    first = {at: x for at, x in enumerate(given) if isinstance(x, Tensor) and x.grad_fn is not None}
    back = {at: stretch.keep(x) for at, x in first.items()}

    def runs(*rest: Any) -> Any:
        values = list(rest)
        for at, give in back.items():
            values[at] = first.pop(at) if at in first else give().detach().requires_grad_()
        return run(*values)

    # Empty ones in their places tell torch of which device they are.
    return runs, [x.new_empty(0) if at in first else x for at, x in enumerate(given)]
