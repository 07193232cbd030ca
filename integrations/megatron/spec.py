"""Put the ring, and norms that know tensor-sequence parallelism, into Megatron's specs."""

from collections.abc import Callable
from copy import copy
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any, TypeVar

from megatron.core.extensions import transformer_engine
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.transformer import transformer_block
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig

from ring_sp.installed import apex
from ring_sp.integrations.megatron.core_attention import RingCoreAttention
from ring_sp.integrations.megatron.norm import TensorSequenceNorm
from ring_sp.integrations.megatron.ring import MegatronRing

Spec = TypeVar("Spec")
Swap = Callable[[str, Any], Any]
"""What takes the place of a field's value; None to look inside it."""


def stock_cores() -> tuple[type, ...]:
    """Megatron's own core attentions, which the ring replaces."""
    fused = getattr(transformer_engine, "TEDotProductAttention", None)
    return (DotProductAttention, *([fused] if isinstance(fused, type) else []))


def with_ring_attention(spec: Spec, ring: MegatronRing) -> Spec:
    """A copy of a layer, block, multi-token-prediction or hybrid spec in which every stock
    `core_attention` is the ring.

    Raises ValueError if the spec has none.
    """
    replaced, count = ring_spec(spec, ring)
    if not count:
        module = getattr(spec, "module", type(spec))
        raise ValueError(f"the spec of {module} has no core_attention to replace")
    return replaced


def ring_spec(spec: Spec, ring: MegatronRing) -> tuple[Spec, int]:
    """`with_ring_attention`, and how many cores it replaced; none is no error."""
    core = ModuleSpec(module=RingCoreAttention, params={"ring": ring})
    known = (*stock_cores(), RingCoreAttention)

    def swap(name: str, value: Any) -> Any:
        module = value.module if isinstance(value, ModuleSpec) else value
        return core if name == "core_attention" and module in known else None

    return _replace(spec, swap)


def block_spec(spec: Any, config: TransformerConfig, vp_stage: int | None = None) -> Any:
    """A spec with norms for tensor-sequence parallelism; of a layer, the block of such layers."""
    layer = isinstance(spec, ModuleSpec) and issubclass(
        spec.module, transformer_block.BaseTransformerLayer
    )
    if layer:
        # Megatron makes this list itself, with the norm behind the last layer.
        spec = transformer_block._get_block_submodules(config, spec, vp_stage)
    return with_tensor_sequence_norms(spec, config)


def with_tensor_sequence_norms(spec: Spec, config: TransformerConfig) -> Spec:
    """A copy of a spec in which norms of plain torch work under tensor-sequence parallelism, and
    take the place of apex's where it cannot serve: Megatron asks for it wherever a package of that
    name is, built with its kernels or not.
    """
    fused = config.normalization == "LayerNorm" and "fused_layer_norm_cuda" in apex()[1]
    plain = (WrappedTorchNorm,) if fused else (WrappedTorchNorm, FusedLayerNorm)

    def swap(_: str, value: Any) -> Any:
        return TensorSequenceNorm if any(value is norm for norm in plain) else None

    replaced: Spec = _replace(spec, swap)[0]
    return replaced


def _replace(node: Any, swap: Swap) -> tuple[Any, int]:
    """A copy of a spec, of its submodules, or of a list of specs, and how many fields it changed.

    A spec that several layers share is copied for each: they share nothing that is built.
    """
    if isinstance(node, list | tuple):
        parts = [_replace(part, swap) for part in node]
        return type(node)(part for part, _ in parts), sum(count for _, count in parts)
    if isinstance(node, partial):
        swapped = {name: _field(name, value, swap) for name, value in node.keywords.items()}
        total = sum(count for _, count in swapped.values())
        keywords = {name: value for name, (value, _) in swapped.items()}
        return (partial(node.func, *node.args, **keywords) if total else node), total
    if not is_dataclass(node) or isinstance(node, type):
        return node, 0
    node, total = copy(node), 0
    for name in (field.name for field in fields(node)):
        replaced, count = _field(name, getattr(node, name), swap)
        if count:
            setattr(node, name, replaced)
            total += count
    return node, total


def _field(name: str, value: Any, swap: Swap) -> tuple[Any, int]:
    swapped = swap(name, value)
    return _replace(value, swap) if swapped is None else (swapped, 1)
