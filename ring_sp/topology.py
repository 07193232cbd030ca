"""Process groups: rings orthogonal to the data, tensor and pipeline groups."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ring_sp.exchanges import check_exchange, gathered, refuse_nested
from ring_sp.layout import whole_number
from ring_sp.ring import Axis
from ring_sp.symmetric import Memory, check

AXES = ("pipeline", "data", "outer", "ring", "ulysses", "tensor")
"""The axes of a world, slowest first: Megatron's rank order, tensor ranks adjacent."""

SEQUENCE = ("outer", "ring", "ulysses")
"""The axes over which one sequence is spread."""

RINGS = ("outer", "ring")
"""Those round which keys and values go."""


@dataclass(frozen=True)
class Topology:
    """The ranks that share one sequence: an outer ring of inner rings of Ulysses groups.

    The default is one rank by itself.
    """

    outer: Axis = Axis()
    ring: Axis = Axis()
    ulysses: Axis = Axis()
    group: dist.ProcessGroup | None = None
    sums_dtype: torch.dtype | None = None
    """In which sums of gradients travel, if it is not for the ring to choose."""
    gather: int | None = None
    """Sources whose keys a visit sees together; None for a ring, which shows one at a time."""
    agreements: dict[str, None] = field(default_factory=dict, compare=False, repr=False)
    """What its ranks have agreed on, oldest first; see agreement.py."""

    def __post_init__(self) -> None:
        if self.gather:
            refuse_nested(self.outer.size, self.ring.size)

    @property
    def exchange(self) -> str:
        """How tensors reach other stations: one of `exchanges.EXCHANGES`."""
        if self.gather is not None:
            return f"gather:{self.gather}"
        return "copies" if any(axis.memory for axis in self.rings) else "messages"

    @property
    def size(self) -> int:
        """Ranks that share a sequence."""
        return self.ring_size * self.ulysses.size

    @property
    def rank(self) -> int:
        """This rank's number among them: outer slowest, Ulysses fastest."""
        return self.ring_rank * self.ulysses.size + self.ulysses.rank

    @property
    def ring_size(self) -> int:
        """Stations of the ring, outer and inner: the ranks without their Ulysses peers."""
        return self.outer.size * self.ring.size

    @property
    def ring_rank(self) -> int:
        return self.outer.rank * self.ring.size + self.ring.rank

    @property
    def rings(self) -> tuple[Axis, ...]:
        """The rings that a tensor goes round, slowest first; none for a single station."""
        return tuple(axis for axis in (self.outer, self.ring) if axis.size > 1)


class ProcessGroupManager:
    """The groups of a world, or of a part that a host already built.

    Make it with `build` or `from_group`, at one point that all its ranks reach together.
    """

    def __init__(
        self, topology: Topology, axes: dict[str, Axis], mesh: DeviceMesh | None = None
    ) -> None:
        self.topology = topology
        """What `ShardedSequence` needs to know."""
        self.mesh, self._axes = mesh, axes
        """The DeviceMesh with dimensions `AXES`; None where a host's group was subdivided."""

    @classmethod
    def build(
        cls,
        *,
        tensor: int = 1,
        ring: int = 1,
        ulysses: int = 1,
        outer: int = 1,
        pipeline: int = 1,
        device_type: str | None = None,
        exchange: str = "messages",
        sums_dtype: torch.dtype | None = None,
    ) -> "ProcessGroupManager":
        """Divide the world into the axes of `AXES`; data is what is left. Collective over the
        world.

        `device_type` is that of the tensors to send: by default "cuda" where there is one and the
        default group serves it, else "cpu". `exchange` is how rings move tensors: in "messages" of
        their groups' backend, or in "copies" by the GPUs' copy engines into memory of their own,
        where all GPUs of a ring are in one host (symmetric.py); or in no ring: "gather:N" is in
        messages of N sources at a time, by default `default_sources` (gather.py). `sums_dtype` is
        that of gradients under way: q's or float32, by default float32 in rings of more than two.
        Without torch.distributed the world is one process. Raises ValueError, before any
        communication, for an unknown exchange, sizes below 1 or that do not divide the world, and
        NotImplementedError where copies cannot be and for gathers over rings of rings.
        """
        check_exchange(exchange, outer, ring)
        names = [name for name in AXES if name != "data"]
        sizes = dict(zip(names, (pipeline, outer, ring, ulysses, tensor), strict=True))
        shape = grid_shape(dist.get_world_size() if dist.is_initialized() else 1, sizes)
        if not dist.is_initialized():
            return cls(Topology(), {name: Axis() for name in (*AXES, "sequence", "data_sequence")})
        if exchange == "copies":
            members = [each for dim in RINGS for each in grid_groups(shape, [AXES.index(dim)])]
            check(None, members, worldwide=False)
        device_type = device_type or _device_type()
        mesh = init_device_mesh(
            device_type, shape, mesh_dim_names=AXES, **_ring_options(device_type)
        )
        axes = {name: _axis(mesh.get_group(name)) for name in AXES}
        for name, joined in (("sequence", SEQUENCE), ("data_sequence", ("data", *SEQUENCE))):
            axes[name] = _joined(axes, mesh, joined)
        return cls(_topology(axes, exchange, sums_dtype), axes, mesh)

    @classmethod
    def from_group(
        cls,
        group: dist.ProcessGroup,
        *,
        ulysses: int = 1,
        outer: int = 1,
        exchange: str = "messages",
        sums_dtype: torch.dtype | None = None,
    ) -> "ProcessGroupManager":
        """Subdivide a host's sequence-parallel group into outer x ring x Ulysses; the ring is what
        is left.

        Where `ulysses` or `outer` exceeds 1 this makes new groups, and every rank of the world must
        call it at one point, each with its own group; else it communicates with nobody but, for
        copies, the group. `exchange` and `sums_dtype` as in `build`. Raises ValueError, before any
        communication, for an unknown exchange, sizes below 1 or that do not divide the group, and
        NotImplementedError as `build`.
        """
        ranks = dist.get_process_group_ranks(group)
        for name, size in (("ulysses", ulysses), ("outer", outer)):
            _check_size(name, size)
        if len(ranks) % (ulysses * outer):
            raise ValueError(
                f"the sequence-parallel group has {len(ranks)} ranks, which outer {outer} x "
                f"ulysses {ulysses} does not divide. Choose sizes whose product divides it."
            )
        shape = (outer, len(ranks) // (outer * ulysses), ulysses)
        check_exchange(exchange, *shape[:2])
        if exchange == "copies":
            rings = [ring for dim in RINGS for ring in grid_groups(shape, [SEQUENCE.index(dim)])]
            # All ranks of the world make the parts of a group: none may raise alone.
            check(group, rings, worldwide=ulysses * outer > 1)
        axes = dict(zip(SEQUENCE, _parts(group, shape), strict=True))
        axes["sequence"] = _axis(group)
        return cls(_topology(axes, exchange, sums_dtype), axes)

    def group(self, name: str) -> dist.ProcessGroup | None:
        """This rank's group of an axis of `AXES`, of "sequence", or of "data_sequence" (where
        gradients are reduced); None for a process without torch.distributed.
        """
        return self._axis(name).group

    def size(self, name: str) -> int:
        """Ranks in `group(name)`."""
        return self._axis(name).size

    def rank(self, name: str) -> int:
        """This rank's number in `group(name)`."""
        return self._axis(name).rank

    def _axis(self, name: str) -> Axis:
        if name not in self._axes:
            raise ValueError(f"the axis must be one of {', '.join(self._axes)}; got {name!r}")
        return self._axes[name]


def grid_shape(world_size: int, sizes: dict[str, int]) -> tuple[int, ...]:
    """Ranks along each axis of `AXES`, data filled in. Raises ValueError for sizes that do not
    divide the world.
    """
    for name, size in sizes.items():
        _check_size(name, size)
    model = prod(sizes.values())
    if world_size % model:
        product = " x ".join(f"{name} {sizes[name]}" for name in AXES if name in sizes)
        raise ValueError(
            f"{product} needs a multiple of {model} ranks; the world has {world_size}. "
            f"Start more processes or choose smaller sizes."
        )
    sizes = {**sizes, "data": world_size // model}
    return tuple(sizes.get(name, 1) for name in AXES)


def grid_groups(shape: Sequence[int], dims: Sequence[int]) -> list[list[int]]:
    """Ranks of a row-major grid grouped so that each group varies along `dims` only, in rank
    order.
    """
    grid = torch.arange(prod(shape)).view(*shape)
    kept = [dim for dim in range(len(shape)) if dim not in dims]
    return grid.permute(*kept, *dims).reshape(-1, prod(shape[dim] for dim in dims)).tolist()


def _check_size(name: str, size: int) -> None:
    if whole_number(f"the size of {name}", size) < 1:
        raise ValueError(f"{name} needs a size of at least 1; got {size}")


def _axis(group: dist.ProcessGroup) -> Axis:
    return Axis(dist.get_rank(group), dist.get_world_size(group), group)


def _topology(axes: dict[str, Axis], exchange: str, sums_dtype: torch.dtype | None) -> Topology:
    outer, ring = (axes[name] for name in RINGS)
    if exchange == "copies":
        nested = min(outer.size, ring.size) > 1
        outer, ring = (_with_memory(axis, nested) for axis in (outer, ring))
    gather = gathered(exchange, outer.size * ring.size)
    return Topology(outer, ring, axes["ulysses"], axes["sequence"].group, sums_dtype, gather)


def _with_memory(axis: Axis, nested: bool) -> Axis:
    if axis.group is None or axis.size == 1:
        return axis
    return replace(axis, memory=Memory(axis.group, nested))


def _device_type() -> str:
    """Where tensors are sent from, by default."""
    config = dist.get_backend_config(dist.group.WORLD)  # such as cpu:gloo,cuda:nccl
    served = {entry.split(":")[0] for entry in config.split(",")}
    return "cuda" if "cuda" in served and torch.cuda.is_available() else "cpu"


def _ring_options(device_type: str) -> dict[str, Any]:
    """NCCL's transfers may go first where a kernel's blocks wait for room: a transfer that started
    beside an attention kernel was seen to wait for all of it (8k tokens a rank, 2 H200: 0.15 ms
    beside a forward of 1.5 ms).
    """
    known = "backend_override" in signature(init_device_mesh).parameters
    if device_type != "cuda" or dist.get_backend() != "nccl" or not known:
        return {}
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    return {"backend_override": dict.fromkeys(RINGS, ("nccl", options))}


def _joined(axes: dict[str, Axis], mesh: DeviceMesh, names: Sequence[str]) -> Axis:
    """The axis that several axes of a mesh form together; an existing group where all others
    have one rank.
    """
    wide = [axes[name] for name in names if axes[name].size > 1]
    if len(wide) < 2:
        return wide[0] if wide else axes[names[-1]]
    group, _ = dist.new_subgroups_by_enumeration(
        grid_groups(mesh.shape, [AXES.index(name) for name in names])
    )
    return _axis(group)


def _parts(group: dist.ProcessGroup, shape: tuple[int, ...]) -> list[Axis]:
    """This rank's place along each dimension of a group laid out as a row-major grid."""
    whole = [_axis(group) if size == prod(shape) else Axis() for size in shape]
    if shape[SEQUENCE.index("ring")] == prod(shape):
        return whole
    # All ranks make all groups in one order: torch names a group that only its members make by the
    # number of groups they are in, and those whose numbers differ wait for each other for ever.
    asked: list[tuple[list[int], tuple[int, ...]]] = [([], ())] * dist.get_world_size()
    dist.all_gather_object(asked, (dist.get_process_group_ranks(group), shape))
    made: list[tuple[int, Axis]] = []
    for ranks, grid in sorted({(tuple(ranks), grid) for ranks, grid in asked}):
        for dim in (dim for dim, size in enumerate(grid) if 1 < size < prod(grid)):
            for places in grid_groups(grid, [dim]):
                members = [ranks[place] for place in places]
                part = dist.new_group(members)
                if dist.get_rank() in members:
                    made.append((dim, _axis(part)))
    for dim, axis in made:
        whole[dim] = axis
    return whole
