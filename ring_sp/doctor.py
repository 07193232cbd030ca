"""What is installed, whether a ring of these ranks gives the right result, and what to do about
what is wrong.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from time import perf_counter

import torch
import torch.distributed as dist

from ring_sp import masks
from ring_sp.attention import ring_attention
from ring_sp.group import Group
from ring_sp.installed import APEX_EXTENSIONS, apex, device, folder, kernels, version
from ring_sp.layout import LAYOUTS
from ring_sp.sequence import ShardedSequence

TOLERANCE = {torch.float64: 1e-10, torch.bfloat16: 0.02}
"""Relative error of a round trip: float64's rounding, and that of bf16 results."""
ENOUGH_SECONDS = 10.0
"""A round trip that takes longer than this says so."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `remedy` says what to do where something is wrong or missing,
    `fatal` that results are wrong.
    """

    name: str
    what: str
    remedy: str = ""
    fatal: bool = False


def examine(group: Group) -> list[Finding]:
    """Look at everything. Collective."""
    found = [*_versions(), *_kernels(), *_hosts(), *_gpus(group), *_links(group)]
    return [*found, *_round_trips(group)]


def lines(findings: Iterable[Finding]) -> Iterator[str]:
    """A report: what was found, then what to do."""
    found = list(findings)
    for each in found:
        mark = "WRONG " if each.fatal else "! " if each.remedy else ""
        yield f"{each.name:<22}{mark}{each.what}"
    wanted = [each for each in found if each.remedy]
    yield ""
    yield "what to do" if wanted else "nothing is wrong"
    for each in wanted:
        yield f"  {each.name}: {each.remedy}"


def _versions() -> Iterator[Finding]:
    yield Finding("python", sys.version.split()[0])
    yield Finding("torch", f"{torch.__version__}, {device()}")
    packages = {
        "triton": ("triton", "triton", "pip install 'ring_sp[triton]' for our own kernels"),
        "flash-attn-4": (
            "flash_attn.cute",
            "flash-attn-4",
            "pip install 'ring_sp[flash4]': the fastest kernel of Hopper and Blackwell",
        ),
    }
    for name, (package, distribution, remedy) in packages.items():
        there = version(package, distribution)
        wanted = there is None and torch.cuda.is_available()
        yield Finding(name, there or "missing", remedy if wanted else "")


def _kernels() -> Iterator[Finding]:
    reasons = kernels()
    first = next((name for name, reason in reasons.items() if reason is None), None)
    yield Finding(
        "kernel of auto",
        f"{first or 'none'}, for bf16, head dim 128",
        "exact but slow: see why the others cannot"
        if first == "reference" and torch.cuda.is_available()
        else "",
    )
    for name, reason in reasons.items():
        yield Finding(f"  {name}", reason or "can serve")


def _hosts() -> Iterator[Finding]:
    core = folder("megatron.core")
    yield Finding("Megatron-core", version("megatron.core", "megatron-core") or "missing")
    engine = version("transformer_engine", "transformer-engine")
    yield Finding("Transformer Engine", engine or "missing: not needed")
    kind, extensions = apex()
    foreign = kind not in (None, "NVIDIA")
    remedy = "pip uninstall apex, or install https://github.com/NVIDIA/apex"
    if foreign and core is not None:
        remedy = f"Megatron takes it for NVIDIA's and fails: {remedy}"
    yield Finding(
        "apex",
        f"{kind}, which is not NVIDIA's" if foreign else kind or "missing: not needed",
        remedy if foreign else "",
    )
    for name, use in APEX_EXTENSIONS.items() if kind == "NVIDIA" else ():
        yield Finding(f"  {name}", f"{'there' if name in extensions else 'missing'}; for {use}")


def _gpus(group: Group) -> Iterator[Finding]:
    if not torch.cuda.is_available():
        smi = shutil.which("nvidia-smi") is not None
        remedy = (
            f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, and nvidia-smi is "
            f"there: install a torch for its driver, or give this process the GPUs"
        )
        yield Finding("GPUs", "none: CPU and gloo", remedy if smi else "")
        return
    properties = torch.cuda.get_device_properties(group.device)
    free, total = torch.cuda.mem_get_info(group.device)
    in_use = 1 - free / total
    yield Finding(
        "GPU of rank 0",
        f"{properties.name}, {total / 1e9:.0f} GB, {in_use:.0%} in use, compute capability "
        f"{properties.major}.{properties.minor}",
        "another process holds its memory: see nvidia-smi" if in_use > 0.1 else "",
    )
    names = group.everywhere(properties.name)
    if len(set(names)) > 1:
        yield Finding("GPUs", f"of several kinds: {sorted(set(names))}", "rings go as the slowest")
    if dist.is_nccl_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        yield Finding("NCCL", nccl)
    else:
        yield Finding(
            "NCCL", "missing", "this build of torch cannot send between GPUs: install another"
        )


def _links(group: Group) -> Iterator[Finding]:
    yield Finding("ranks", f"{group.size} on {len(set(group.hosts))} hosts")
    smi = shutil.which("nvidia-smi")
    if smi is None or not torch.cuda.is_available() or torch.cuda.device_count() < 2:
        return
    asked = subprocess.run(
        [smi, "topo", "-m"], capture_output=True, text=True, check=False, timeout=30
    )
    rows = [row.split() for row in asked.stdout.splitlines() if row.startswith("GPU")]
    number = len(rows)
    kinds = {row[1 + peer] for at, row in enumerate(rows) for peer in range(number) if peer != at}
    slow = sorted(kind for kind in kinds if not kind.startswith("NV"))
    yield Finding(
        "links of this host",
        ", ".join(sorted(kinds)) or "nvidia-smi topo says nothing",
        f"GPUs reach each other by {', '.join(slow)}, not by NVLink: run ring-sp bench, and "
        f"ring-sp plan with its file; prefer an outer ring over the slow links"
        if slow
        else "",
    )


def _round_trips(group: Group) -> Iterator[Finding]:
    if group.size == 1:
        yield Finding(
            "ring", "one rank: only the kernel is checked; torchrun --nproc_per_node N checks links"
        )
    on_gpu = group.device.type == "cuda"
    for dtype in (torch.float64, torch.bfloat16) if on_gpu else (torch.float64,):
        begin = perf_counter()
        try:
            error = max(round_trip(group, dtype, layout) for layout in LAYOUTS)
        except (ValueError, RuntimeError) as problem:
            reason = str(problem).splitlines()[0]
            yield Finding(f"round trip, {_name(dtype)}", reason, _REMEDY, fatal=True)
            return
        seconds = perf_counter() - begin
        wrong = not error <= TOLERANCE[dtype]
        slow = seconds > ENOUGH_SECONDS
        yield Finding(
            f"round trip, {_name(dtype)}",
            f"error {error:.1e} of out, dq, dk and dv, {len(LAYOUTS)} layouts, {seconds:.1f} s",
            _REMEDY if wrong else "slow: run ring-sp bench, and see each hop" if slow else "",
            fatal=wrong,
        )


_REMEDY = (
    "do not train: run bash tests/run.sh --gpu in a checkout, try kernel='reference' and "
    "exchange='messages', and report what differs with this page"
)


def round_trip(group: Group, dtype: torch.dtype, layout: str) -> float:
    """The largest relative error of a ring's out, dq, dk and dv against unsharded attention in
    float64, over the ranks. Collective; every rank returns it.
    """
    sequence = ShardedSequence(64 * group.size + 5, group.topology, masks.causal(), layout)
    make = torch.Generator().manual_seed(0)
    whole = [
        torch.randn(1, sequence.seq_len, heads, 64, generator=make, dtype=torch.float64)
        .to(group.device, dtype)
        .requires_grad_()
        for heads in (4, 2, 2, 4)
    ]
    exact = [x.detach().double().requires_grad_() for x in whole]
    expected = _results(exact, ShardedSequence(sequence.seq_len), "reference")
    parts = [sequence.shard(x.detach()).requires_grad_() for x in whole]
    results = _results(parts, sequence, "auto")
    error = max(
        _error(result, sequence.shard(full)) for result, full in zip(results, expected, strict=True)
    )
    return float(max(group.everywhere(error)))


def _results(
    tensors: list[torch.Tensor], sequence: ShardedSequence, kernel: str
) -> Iterator[torch.Tensor]:
    """out, dq, dk and dv of q, k, v and dout."""
    q, k, v, dout = tensors
    out = ring_attention(q, k, v, sequence, kernel=kernel)
    return chain([out.detach()], torch.autograd.grad(out, (q, k, v), dout.detach()))


def _error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """NaN counts as infinite."""
    off = (result.double() - expected).norm() / expected.norm()
    return float(off.nan_to_num(nan=float("inf")))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
