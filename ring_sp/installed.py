"""What is installed on this machine, looked for without importing it."""

from importlib import metadata, util
from pathlib import Path

import torch

from ring_sp.kernels import KERNELS
from ring_sp.kernels.contract import Call

APEX_EXTENSIONS = {
    "amp_C": "multi-tensor scaling and norms, FusedAdam",
    "fused_layer_norm_cuda": "fused layer norm",
    "fast_layer_norm": "persistent layer norm",
    "fused_weight_gradient_mlp_cuda": "fused accumulation of weight gradients",
}
"""The parts of NVIDIA's apex that Megatron uses; each is built or not by itself."""


def folder(package: str) -> Path | None:
    """Where a package is; None where there is none."""
    try:
        spec = util.find_spec(package)
    except (ImportError, ValueError):
        return None
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]) if places else None


def version(package: str, distribution: str) -> str | None:
    """Of a package, by the name under which it was installed; None where there is none."""
    if folder(package) is None:
        return None
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "of unknown version"


def apex() -> tuple[str | None, frozenset[str]]:
    """Whose apex this is, and which of its extensions are built."""
    place = folder("apex")
    if place is None:
        return None, frozenset()
    if not (place / "multi_tensor_apply").is_dir():
        try:
            about = metadata.metadata("apex")
            return f"{about['Name']} {about['Version']} ({about['Summary']})", frozenset()
        except metadata.PackageNotFoundError:
            return f"the folder {place}", frozenset()
    return "NVIDIA", frozenset(name for name in APEX_EXTENSIONS if util.find_spec(name))


def kernels() -> dict[str, str | None]:
    """Why each kernel cannot serve bf16 heads of 128 on this machine; None if it can."""
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    call = Call(device_type, torch.bfloat16, 128, 128, scale=128**-0.5)
    return {name: kernel.refusal(call) for name, kernel in KERNELS.items()}


def device() -> str:
    """The GPUs in words."""
    if not torch.cuda.is_available():
        return "no GPU"
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
