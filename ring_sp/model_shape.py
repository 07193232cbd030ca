"""Shapes of decoder-only transformers for the planner: weights and FLOPs. No torch here."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ring_sp.hardware import read_json


@dataclass(frozen=True)
class ModelShape:
    """A pre-norm decoder without biases. Raises ValueError for sizes that are no whole numbers
    above 0, gated and tied that are no bools, and key heads that do not divide the query heads.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    """Width inside the feed-forward."""
    vocab: int
    gated: bool = True
    """Whether the feed-forward is SwiGLU's three products and not two."""
    tied: bool = False
    """Whether the output layer has the embedding's weights."""

    def __post_init__(self) -> None:
        for field in fields(self)[1:-2]:
            value = getattr(self, field.name)
            if type(value) is not int or value < 1:
                raise ValueError(
                    f"model {self.name}: {field.name} must be a whole number above 0; got {value!r}"
                )
        for field in fields(self)[-2:]:
            value = getattr(self, field.name)
            if not isinstance(value, bool):
                raise ValueError(
                    f"model {self.name}: {field.name} must be true or false; got {value!r}"
                )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"model {self.name}: kv_heads must divide {self.heads} heads; got {self.kv_heads}"
            )

    @property
    def ffn_weights(self) -> int:
        """Of a layer's feed-forward."""
        return (3 if self.gated else 2) * self.hidden * self.ffn

    @property
    def layer_weights(self) -> int:
        """Of a layer, norms left out."""
        projections = 2 * self.heads + 2 * self.kv_heads
        return projections * self.head_dim * self.hidden + self.ffn_weights

    @property
    def product_weights(self) -> int:
        """Those that each token is multiplied with: all but the embedding."""
        return self.layers * self.layer_weights + self.vocab * self.hidden

    @property
    def weights(self) -> int:
        """All of them, norms left out."""
        return self.product_weights + (0 if self.tied else self.vocab * self.hidden)

    def flops(self, tokens: int, pairs: int) -> int:
        """FLOPs of a training step over `tokens` in which `pairs` of queries and keys see each
        other, nothing counted twice: 6 a weight and token; 12 a layer, head, head dim and pair.
        """
        attention = 12 * self.layers * self.heads * self.head_dim * pairs
        return 6 * self.product_weights * tokens + attention


def known() -> dict[str, ModelShape]:
    """Llamas and Qwens as published, and the GPTs of arXiv:2310.01889 appendix D, which names their
    hidden sizes only: layers make 12 layers hidden^2 the weights of the name; head dim 128, LLaMA's
    32,000 words.
    """
    llamas: dict[str, tuple[Any, ...]] = {
        "llama-1b": (16, 2048, 32, 8, 64, 8192, 128256, True, True),
        "llama-3b": (28, 3072, 24, 8, 128, 8192, 128256, True, True),
        "llama-8b": (32, 4096, 32, 8, 128, 14336, 128256),
        "llama-70b": (80, 8192, 64, 8, 128, 28672, 128256),
        "llama-405b": (126, 16384, 128, 8, 128, 53248, 128256),
    }
    qwens: dict[str, tuple[Any, ...]] = {
        "qwen3-0.6b": (28, 1024, 16, 8, 128, 3072, 151936, True, True),
        "qwen3-1.7b": (28, 2048, 16, 8, 128, 6144, 151936, True, True),
        "qwen3-8b": (36, 4096, 32, 8, 128, 12288, 151936),
    }
    models = {name: ModelShape(name, *sizes) for name, sizes in (llamas | qwens).items()}
    for size, (weights, hidden) in PAPER_SIZES.items():
        name, heads, layers = f"gpt-{size}", hidden // 128, round(weights / 12 / hidden**2)
        models[name] = ModelShape(
            name, layers, hidden, heads, heads, 128, 4 * hidden, 32000, gated=False
        )
    return models


PAPER_SIZES = {
    "7b": (7e9, 4096),
    "13b": (13e9, 5120),
    "33b": (33e9, 7168),
    "65b": (65e9, 8192),
    "175b": (175e9, 12288),
    "1t": (1e12, 36864),
}
"""Weights and hidden sizes of arXiv:2310.01889 appendix D."""


def find(name: str) -> ModelShape:
    """The model of a name or of a JSON file, with other sizes where given: "llama-8b:layers=4" or
    "llama-1b:heads=16,head_dim=128". Raises ValueError for what is neither, listing the known
    names, for fields that a model has not, and for a file that does not describe a model.
    """
    base, changed = options(name)
    models = known()
    if base in models:
        found = models[base]
    else:
        path = Path(base)
        if path.suffix != ".json" or not path.is_file():
            raise ValueError(
                f"model must be one of {', '.join(models)}, or a .json file; got {name}"
            )
        found = ModelShape(**read_json(path, ModelShape))
    names = [field.name for field in fields(ModelShape)]
    if changed.keys() - names[1:]:
        raise ValueError(f"of a model {', '.join(names[1:])} can be given; got {name}")
    return replace(found, name=name if changed else found.name, **changed)


def options(text: str) -> tuple[str, dict[str, Any]]:
    """A name, and what follows it: "name:count=4,flag=true" gives (name, {count: 4, flag: True}).
    Raises ValueError for another form.
    """
    name, _, rest = text.partition(":")
    found: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        try:
            found[key] = {"true": True, "false": False}.get(value.lower())
            found[key] = int(value) if found[key] is None else found[key]
        except ValueError:
            raise ValueError(f"{part!r} of {text!r} is not name=number or name=true") from None
    return name, found
