"""Weights that every rank of a topology holds whole, and whose gradients are summed over it."""

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from ring_sp.topology import Topology


def replicated(
    topology: Topology, module: nn.Module, method: Callable[..., Tensor], *args: Any
) -> Tensor:
    """method(*args), with the gradients of the module's parameters summed over the topology."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if topology.size == 1 or not trained:
        return method(*args)
    copies = _Replicate.apply(topology.group, *trained.values())
    return called_with(dict(zip(trained, copies, strict=True)), module, method, *args)


def called_with(
    parameters: dict[str, Tensor], module: nn.Module, method: Callable[..., Tensor], *args: Any
) -> Tensor:
    """method(*args) of a module, with these tensors in place of some of its parameters."""
    call = nn.Module()  # functional_call takes a module; this one calls the method.
    call.module, call.forward = module, method
    found: Tensor = functional_call(
        call, {f"module.{name}": x for name, x in parameters.items()}, args
    )
    return found


class _Replicate(torch.autograd.Function):
    """Gives the tensors; backward sums their gradients over the group, all in one message."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dtype = reduce(torch.promote_types, (grad.dtype for grad in grads), torch.float32)
        flat = grads[0].new_empty(sum(grad.numel() for grad in grads), dtype=dtype)
        sums = flat.split([grad.numel() for grad in grads])
        for part, grad in zip(sums, grads, strict=True):
            part.view_as(grad).copy_(grad)
        dist.all_reduce(flat, group=ctx.group)
        return None, *(x.view_as(g).to(g.dtype) for x, g in zip(sums, grads, strict=True))
