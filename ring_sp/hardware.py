"""Machines for the planner: what a datasheet says of a GPU, what was measured, and JSON files. No
torch here.
"""

import json
from dataclasses import MISSING, asdict, dataclass, fields
from math import inf
from pathlib import Path
from typing import Any

SHARES = {
    "matmul_rate": ("peak_flops", 700e12 / 989e12),
    "forward_rate": ("peak_flops", 650e12 / 989e12),
    "backward_rate": ("peak_flops", 605e12 / 989e12),
    "copy_rate": ("memory_bandwidth", 4.2e12 / 4.8e12),
    "link_rate": ("link_bandwidth", 285e9 / 450e9),
    "network_rate": ("network_bandwidth", 0.9),
    "host_rate": ("host_bandwidth", 0.85),
}
"""Each achieved rate as a share of a datasheet's number. Measured on H200 (torch 2.11, bf16:
products of 8192^3; flash-attn-4, causal, head dim 128, 32k tokens; device copies; NCCL send and
receive of 256 MiB), but for the network's and the host's, which are assumed.
"""
HEAD_DIM_SHARES = {64: (0.84, 0.85), 128: (1.0, 1.0), 256: (1.08, 0.63)}
"""Rates of attention, forward and backward, by head dim, as shares of those of 128: flash-attn-4 on
one H200, causal, 16k tokens, 32:8 heads of 64 and 16:8 of 256 beside 32:8 of 128.
"""


@dataclass(frozen=True)
class Hardware:
    """One GPU (or TPU chip) and its links. FLOP/s, bytes, bytes/s; links are one way and of one
    GPU.

    First what a datasheet promises, then `*_rate`: what a program gets. `measured` names the rates
    that were measured on such a machine; the others are the H200's shares of the datasheet
    (`SHARES`). Raises ValueError for numbers that are not positive, and GPUs in parts.
    """

    name: str
    peak_flops: float
    """Dense bf16."""
    memory_bytes: float
    memory_bandwidth: float
    link_bandwidth: float
    """To a GPU of the same host."""
    network_bandwidth: float
    """To another host."""
    gpus_per_host: int
    matmul_rate: float
    """Of large matrix products."""
    forward_rate: float
    """Of causal attention with head dim 128: 4 FLOPs a head, head dim and visible pair."""
    backward_rate: float
    """The same, 10 FLOPs."""
    copy_rate: float
    """Of memory read and written, together."""
    link_rate: float
    network_rate: float
    measured: tuple[str, ...] = ()
    host_memory_bytes: float = 200e9
    """Of the host's memory, what a GPU may have; assumed."""
    host_bandwidth: float = 64e9
    """To the memory of its own host, by PCIe 5."""
    host_rate: float = 0.85 * 64e9
    """The same, while as much comes back."""
    head_dim_rates: tuple[tuple[int, float, float], ...] = ()
    """Head dim, and the rates of attention forward and backward that were measured with it."""

    def __post_init__(self) -> None:
        rates = [
            (f"head_dim_rates of {each[0]}", value)
            for each in self.head_dim_rates
            for value in each
        ]
        named = [
            (field.name, getattr(self, field.name))
            for field in fields(self)
            if field.name not in {"name", "measured", "head_dim_rates"}
        ]
        for name, value in named + rates:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 < value < inf:
                raise ValueError(
                    f"hardware {self.name}: {name} must be a number above 0; got {value!r}"
                )
        if not isinstance(self.gpus_per_host, int):
            raise ValueError(
                f"hardware {self.name}: gpus_per_host must be a whole number; got "
                f"{self.gpus_per_host}"
            )
        unknown = set(self.measured) - SHARES.keys()
        if unknown:
            raise ValueError(
                f"hardware {self.name}: measured can name {', '.join(SHARES)}; got {unknown}"
            )

    def attention_rates(self, head_dim: int) -> tuple[float, float]:
        """FLOP/s of causal attention, forward and backward: those measured with this head dim, or
        else those of 128 times the share of the next larger one in `HEAD_DIM_SHARES`.
        """
        for dim, forward, backward in self.head_dim_rates:
            if dim == head_dim:
                return forward, backward
        largest = max(HEAD_DIM_SHARES)
        near = min(dim for dim in HEAD_DIM_SHARES if dim >= min(head_dim, largest))
        shares = HEAD_DIM_SHARES[near]
        return self.forward_rate * shares[0], self.backward_rate * shares[1]

    @property
    def sources(self) -> dict[str, str]:
        """Where each rate comes from."""
        return {
            rate: "measured"
            if rate in self.measured
            else f"{share:.2f} of the datasheet's {of.replace('_', ' ')}"
            for rate, (of, share) in SHARES.items()
        }


def from_datasheet(
    name: str,
    compute: tuple[float, float, float],
    links: tuple[float, float, int],
    measured: dict[str, float] | None = None,
    host_bandwidth: float = 64e9,
) -> Hardware:
    """`compute` is peak FLOP/s, memory in bytes and its bytes/s; `links` bytes/s in a host and
    between hosts, and GPUs of a host. Rates that were not measured are `SHARES`.
    """
    names = ("peak_flops", "memory_bytes", "memory_bandwidth")
    sheet: dict[str, Any] = dict(zip(names, compute, strict=True))
    sheet |= zip(("link_bandwidth", "network_bandwidth", "gpus_per_host"), links, strict=True)
    sheet["host_bandwidth"] = host_bandwidth
    found = measured or {}
    rates = {rate: share * sheet[of] for rate, (of, share) in SHARES.items()}
    return Hardware(name, **sheet, **rates | found, measured=tuple(found))


def known() -> dict[str, Hardware]:
    """Machines by name: NVIDIA's and Google's datasheets, TPUs as in arXiv:2310.01889 table 2."""
    gpus = {
        "a100": ((312e12, 80e9, 2.039e12), (300e9, 25e9, 8)),
        "h100": ((989e12, 80e9, 3.35e12), (450e9, 50e9, 8)),
        "b200": ((2250e12, 180e9, 8e12), (900e9, 50e9, 8)),
        # A pod's chips all hang on one torus: the whole pod counts as a host.
        "tpu-v3": ((123e12, 16e9, 0.9e12), (112e9, 112e9, 1024)),
        "tpu-v4": ((275e12, 32e9, 1.2e12), (268e9, 268e9, 4096)),
        "tpu-v5e": ((196e12, 16e9, 0.82e12), (186e9, 186e9, 256)),
    }
    machines = {name: from_datasheet(name, *sheet) for name, sheet in gpus.items()}
    machines["a100"] = from_datasheet("a100", *gpus["a100"], host_bandwidth=32e9)
    measured = {
        "matmul_rate": 700e12,
        "forward_rate": 650e12,
        "backward_rate": 605e12,
        "copy_rate": 4.2e12,
        "link_rate": 285e9,
    }
    machines["h200"] = from_datasheet(
        "h200", (989e12, 141e9, 4.8e12), (450e9, 50e9, 8), measured=measured
    )
    return dict(sorted(machines.items()))


def find(name: str) -> Hardware:
    """The machine of a name or of a JSON file. Raises ValueError for what is neither, listing the
    known names, and for a file that does not describe a machine.
    """
    machines = known()
    if name in machines:
        return machines[name]
    path = Path(name)
    if path.suffix != ".json" or not path.is_file():
        raise ValueError(
            f"hardware must be one of {', '.join(machines)}, or a .json file; got {name}"
        )
    facts = read_json(path, Hardware)
    try:
        measured = tuple(facts.get("measured", ()))
        rates = tuple(map(tuple, facts.get("head_dim_rates", ())))
    except TypeError:
        measured, rates = (), ((),)  # Refused below.
    if any(len(each) != 3 for each in rates):
        raise ValueError(
            f"{path}: measured is a list of rates' names, head_dim_rates a list of [head dim, "
            f"forward, backward]; got {facts.get('measured')} and {facts.get('head_dim_rates')}"
        )
    return Hardware(**facts | {"measured": measured, "head_dim_rates": rates})


def write(hardware: Hardware, path: Path) -> None:
    """Write a machine as a JSON file that `find` reads."""
    path.write_text(json.dumps(asdict(hardware), indent=1) + "\n")


def read_json(path: Path, kind: type) -> dict[str, Any]:
    """The fields of a dataclass from a JSON file. Raises ValueError, naming the fields that are
    unknown and those that are missing.
    """
    try:
        facts = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    names = {field.name for field in fields(kind)}
    needed = {field.name for field in fields(kind) if field.init and _required(field)}
    if not isinstance(facts, dict) or facts.keys() - names or needed - facts.keys():
        got = sorted(facts) if isinstance(facts, dict) else type(facts).__name__
        raise ValueError(f"{path} needs {sorted(needed)} and may have {sorted(names)}; got {got}")
    return facts


def _required(field: Any) -> bool:
    return field.default is MISSING and field.default_factory is MISSING
