"""Put the ring into Megatron's layer specs."""

from copy import copy
from dataclasses import fields, is_dataclass
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec

from ring_sp.integrations.megatron.core_attention import RingCoreAttention
from ring_sp.integrations.megatron.ring import MegatronRing


def with_ring_attention(spec: ModuleSpec, ring: MegatronRing) -> ModuleSpec:
    """A copy of a layer or block spec in which every `core_attention` is the ring.

    Raises ValueError if the spec has none.
    """
    core = ModuleSpec(module=RingCoreAttention, params={"ring": ring})
    replaced, count = _replace(spec, core)
    if not count:
        raise ValueError(f"the spec of {spec.module} has no core_attention to replace")
    return replaced


def _replace(node: Any, core: ModuleSpec) -> tuple[Any, int]:
    """A copy of a spec, of its submodules, or of a list of specs, and how many cores it changed."""
    if isinstance(node, list | tuple):
        parts = [_replace(part, core) for part in node]
        return type(node)(part for part, _ in parts), sum(count for _, count in parts)
    if not is_dataclass(node) or isinstance(node, type):
        return node, 0
    node, total = copy(node), 0
    for name in (field.name for field in fields(node)):
        old = getattr(node, name)
        replaced, count = (core, 1) if name == "core_attention" and old else _replace(old, core)
        if count:
            setattr(node, name, replaced)
            total += count
    return node, total
