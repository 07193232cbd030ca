"""What of Megatron, Transformer Engine, apex and the ring's kernels is on this machine."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from ring_sp.installed import APEX_EXTENSIONS, apex, device, folder, kernels, version

FIRST_TESTED, LAST_TESTED = (0, 16, 1), (0, 19)
"""Versions of Megatron-core that the tests run with; of the last, any patch level. Those
between are let in."""


@dataclass(frozen=True)
class Found:
    """What is there; versions and folders are None where nothing is."""

    megatron: str | None
    megatron_at: Path | None
    has_training: bool
    """Whether megatron.training, its pretraining loop, is there."""
    transformer_engine: str | None
    apex: str | None
    """None, "NVIDIA" or what else goes by that name."""
    apex_extensions: frozenset[str]
    kernels: dict[str, str | None]
    """Why each kernel cannot serve bf16 heads of 128 on this machine; None if it can."""

    def refuse_foreign_apex(self) -> None:
        """Raise ValueError for a package apex that is not NVIDIA's: Megatron would use it."""
        if self.apex not in (None, "NVIDIA"):
            raise ValueError(
                f"the package apex here is {self.apex}, not NVIDIA's, and Megatron takes it for "
                f"that: pip uninstall apex, or install https://github.com/NVIDIA/apex"
            )

    def refuse_untested(self, untested: bool = False) -> None:
        """Raise ValueError without Megatron-core, or for a version that the tests have not run
        with, unless `untested` says that it is meant.
        """
        if self.megatron is None:
            raise ValueError('Megatron-core is not there: pip install "ring_sp[megatron]"')
        version = tuple(map(int, re.findall(r"\d+", self.megatron)[:3]))
        if not untested and not FIRST_TESTED <= version < (0, LAST_TESTED[1] + 1):
            raise ValueError(
                f"ring_sp is tested with Megatron-core {'.'.join(map(str, FIRST_TESTED))} to "
                f"{'.'.join(map(str, LAST_TESTED))}; got {self.megatron} in {self.megatron_at}. "
                f"Use one of these, or say --ring-untested-megatron and compare losses yourself."
            )


def look() -> Found:
    """Look without importing any of it."""
    core = folder("megatron.core")
    kind, extensions = apex()
    return Found(
        megatron=_version_in(core / "package_info.py") if core else None,
        megatron_at=core,
        has_training=folder("megatron.training") is not None,
        transformer_engine=version("transformer_engine", "transformer-engine"),
        apex=kind,
        apex_extensions=extensions,
        kernels=kernels(),
    )


def lines(found: Found) -> list[str]:
    """A report: what was found, and what a model gets."""
    training = "with" if found.has_training else "without"
    at = f", in {found.megatron_at}" if found.megatron_at else ""
    rows = [
        ("Megatron-core", f"{found.megatron or 'missing'}, {training} megatron.training{at}"),
        ("Transformer Engine", found.transformer_engine or "missing"),
        ("apex", found.apex or "missing"),
    ]
    for name, use in APEX_EXTENSIONS.items() if found.apex else ():
        there = "there" if name in found.apex_extensions else "missing"
        rows.append((f"  {name}", f"{there}; for {use}"))
    rows.append(("torch", f"{torch.__version__}, {device()}"))
    rows.append(("kernels", "for bf16, head dim 128"))
    rows.extend((f"  {name}", reason or "can serve") for name, reason in found.kernels.items())
    rows.append(("a model gets", ""))
    rows.extend((f"  {name}", what) for name, what in used(found).items())
    return [f"{name:<33}{what}".rstrip() for name, what in rows]


def used(found: Found) -> dict[str, str]:
    """Whose parts a model gets."""
    engine, parts = found.transformer_engine is not None, found.apex_extensions
    local = "torch, tagged by ring_sp"
    if "fused_layer_norm_cuda" in parts:
        local = f"apex; RMSNorm {local}"
    adam = "torch"
    if engine:
        adam = "Transformer Engine"
    elif found.apex == "NVIDIA":
        # Megatron asks whether the package is there, and not for this part of it.
        adam = "apex" if "amp_C" in parts else "apex, which fails without amp_C"
    # The output layer is Megatron's own with Transformer Engine too.
    fused = "fused_weight_gradient_mlp_cuda" in parts
    return {
        "attention": "the ring, in every layer",
        "norms": f"Transformer Engine; with --transformer-impl local {local}" if engine else local,
        "Adam": adam,
        "weight gradients": (
            "accumulated in the matrix product"
            if fused
            else "accumulated by torch; needs --no-gradient-accumulation-fusion"
        ),
        "recomputed attention": "kept, not another ring; with --no-ring-keep-attention a ring more",
        "dense feed-forward": "whole, with --ring-ff-chunk N by chunks; experts are Megatron's",
        "loss": "Megatron's, of whole logits; see its --cross-entropy-loss-fusion",
    }


def _version_in(info: Path) -> str:
    numbers = dict(re.findall(r"^(MAJOR|MINOR|PATCH) = (\d+)", info.read_text(), re.MULTILINE))
    return ".".join(numbers.get(name, "0") for name in ("MAJOR", "MINOR", "PATCH"))
