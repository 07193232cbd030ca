"""The ring in every model that a stock Megatron script builds.

Megatron has seams for a layer's attention but none for the models of a script that one does not
edit, nor for the split of a batch or the shift of multi-token prediction. This is the one place
that replaces names of Megatron; only `install` does it, and `Installation.remove` undoes it.
"""

import atexit
import sys
from collections.abc import Callable
from functools import partial, wraps
from importlib import import_module
from inspect import signature
from typing import Any

from megatron.core import parallel_state, utils
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import multi_token_prediction
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed import ProcessGroup

from ring_sp.integrations.megatron.batch import SplitBatch, SplitPackedBatch
from ring_sp.integrations.megatron.check import warn_of_loss
from ring_sp.integrations.megatron.feed_forward import use_blockwise
from ring_sp.integrations.megatron.found import look
from ring_sp.integrations.megatron.graphs import drop_graphs
from ring_sp.integrations.megatron.options import RingOptions
from ring_sp.integrations.megatron.ring import MegatronRing
from ring_sp.integrations.megatron.roll import RollTokens
from ring_sp.integrations.megatron.rotary import use_ring_positions
from ring_sp.integrations.megatron.spec import block_spec, ring_spec, stock_cores
from ring_sp.ulysses import kv_replication

_SPECS = ("transformer_layer_spec", "mtp_block_spec", "hybrid_stack_spec", "mamba_stack_spec")
"""The arguments of a model that say what its layers are made of."""
_HYBRIDS = (
    ("megatron.core.models.hybrid.hybrid_model", "HybridModel"),
    ("megatron.core.models.mamba.mamba_model", "MambaModel"),
)


class Installation:
    """What `install` replaced, until `remove`."""

    def __init__(self, options: RingOptions) -> None:
        self.options = options
        self.ring: MegatronRing | None = None
        """The ring of the models built so far."""
        self._undo: list[Callable[[], None]] = []

    def remove(self) -> None:
        """Give Megatron its own back; models that were built keep the ring."""
        while self._undo:
            self._undo.pop()()

    def built_ring(self) -> MegatronRing:
        """The ring of the models. Raises ValueError before the first."""
        if self.ring is None:
            raise ValueError("a batch is cut for a model's ring; build the model first")
        return self.ring

    def ring_over(self, group: ProcessGroup) -> MegatronRing:
        """The ring; made with the first model, which every rank of the world builds."""
        if self.ring is None:
            self.ring = MegatronRing.from_options(self.options, group)
            self.ring.rolls_tokens = True
        return self.ring

    def replace_init(self, kind: type, init: Callable[..., None]) -> None:
        """Build objects of a class with `init`."""
        self._undo.append(partial(setattr, kind, "__init__", vars(kind)["__init__"]))
        kind.__init__ = init  # type: ignore[misc]

    def replace_function(self, original: object, replacement: object) -> None:
        """Put a function in the place of another in all modules: scripts import by name."""
        _swap(original, replacement)
        self._undo.append(partial(_swap, replacement, original))


def install(options: RingOptions, *, untested: bool = False) -> Installation:
    """Give every GPTModel and HybridModel built from now on the ring, in all layers, with the
    batches, positions and multi-token prediction that its layout asks for.

    Call it before the script's own imports from Megatron, once a process, at whose end it has
    `drop_graphs` called. Raises ValueError for a second call, a foreign apex, or a Megatron that is
    not tested unless `untested`.
    """
    found = look()
    found.refuse_untested(untested)
    found.refuse_foreign_apex()
    if hasattr(GPTModel.__init__, "ring_sp"):
        raise ValueError("install was called twice; remove() the first installation")
    made = Installation(options)
    # Stays after remove(): the graphs of models that keep the ring stay too.
    atexit.unregister(drop_graphs)
    atexit.register(drop_graphs)
    for model in (GPTModel, *_present(_HYBRIDS)):
        made.replace_init(model, _with_ring(vars(model)["__init__"], made))
    for core in stock_cores():
        made.replace_init(core, _refusing(core))
    split = utils.get_batch_on_this_cp_rank
    made.replace_function(split, SplitBatch(made.built_ring, signature(split)))
    if packed := getattr(utils, "get_thd_batch_on_this_cp_rank", None):
        made.replace_function(packed, SplitPackedBatch(made.built_ring))
    roll = multi_token_prediction.roll_tensor
    made.replace_function(roll, RollTokens(made.built_ring))
    return made


def _with_ring(build: Callable[..., None], made: Installation) -> Callable[..., None]:
    """A model's `__init__` that puts the ring into its specs first, and looks at it after."""
    known = signature(build)

    @wraps(build)
    def build_with_ring(model: MegatronModule, *args: Any, **kwargs: Any) -> None:
        call = known.bind(model, *args, **kwargs)
        given = call.arguments
        _refuse_heads(given["config"], made.options)
        groups = given.get("pg_collection")
        group = groups.cp if groups else parallel_state.get_context_parallel_group()
        ring = made.ring_over(group)
        for name in set(_SPECS) & given.keys():
            if given[name] is not None:
                ringed, _ = ring_spec(given[name], ring)
                given[name] = block_spec(ringed, given["config"], given.get("vp_stage"))
        build(*call.args, **call.kwargs)
        use_ring_positions(model, ring)
        if made.options.ff_chunk is not None:
            use_blockwise(model, made.options.ff_chunk)
        warn_of_loss(given["config"], ring)

    build_with_ring.ring_sp = True  # type: ignore[attr-defined]
    return build_with_ring


def _refuse_heads(config: TransformerConfig, options: RingOptions) -> None:
    """Raise ValueError where Ulysses ranks do not divide the heads of a tensor rank."""
    heads = config.num_attention_heads // config.tensor_model_parallel_size
    kv_replication(heads, 1, options.ulysses)


def _refusing(kind: type) -> Callable[..., None]:
    """An `__init__` for Megatron's own attention: models that the ring does not reach ask for it,
    such as T5, BERT, vision and multimodal ones.
    """

    def refuse(*_: Any, **__: Any) -> None:
        raise NotImplementedError(
            f"{kind.__name__} was asked for while the ring is installed, which reaches the layers "
            f"of GPTModel and HybridModel only; train this model without --sequence-parallel-ring"
        )

    return refuse


def _present(places: tuple[tuple[str, str], ...]) -> list[type]:
    """Those of some classes that this Megatron has, but for the old name of another, which builds
    the other.
    """
    found = []
    for module, name in places:
        try:
            found.append(getattr(import_module(module), name))
        except (ImportError, AttributeError):
            continue
    return [kind for kind in {*found} if not {*found} & {*kind.__mro__[1:]}]


def _swap(old: object, new: object) -> None:
    """Put `new` wherever a module holds `old` by a name."""
    for module in list(sys.modules.values()):
        held = getattr(module, "__dict__", {})
        for name in [name for name, value in held.items() if value is old]:
            held[name] = new
