"""The ring's arguments on a command line of Megatron's, and what they ask for."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ring_sp.exchanges import EXCHANGES, check_exchange
from ring_sp.kernels import KERNELS
from ring_sp.layout import LAYOUTS

_BARE = 0
"""What --sequence-parallel-ring says without a number."""
_RING, _CONTEXT = "--sequence-parallel-ring", "--context-parallel-size"


@dataclass(frozen=True)
class RingOptions:
    """What the arguments ask for. `size` is the number of ranks that share a sequence, Megatron's
    context-parallel size: outer x ring x ulysses.
    """

    size: int = 1
    layout: str = "zigzag"
    kernel: str = "auto"
    ulysses: int = 1
    outer: int = 1
    exchange: str = "messages"
    keep_attention: bool = True
    ff_chunk: int | None = None
    """Tokens of a rank's sequence that a dense feed-forward is computed for at a time; None for
    all."""

    def __post_init__(self) -> None:
        """Raises ValueError for sizes that do not fit each other, or unknown names, and
        NotImplementedError for an exchange that these rings cannot have.
        """
        sizes = {_RING: self.size, "--ring-ulysses": self.ulysses, "--ring-outer": self.outer}
        if self.ff_chunk is not None:
            sizes["--ring-ff-chunk"] = self.ff_chunk
        for flag, size in sizes.items():
            if size < 1:
                raise ValueError(f"{flag} must be at least 1; got {size}")
        if self.size % (self.ulysses * self.outer):
            raise ValueError(
                f"--ring-outer {self.outer} x --ring-ulysses {self.ulysses} must divide the "
                f"{self.size} ranks of {_RING}; choose sizes whose product divides it"
            )
        for flag, value, known in (
            ("--ring-layout", self.layout, LAYOUTS),
            ("--ring-kernel", self.kernel, ("auto", *KERNELS)),
            ("--ring-exchange", self.exchange, EXCHANGES),
        ):
            if value not in known:
                raise ValueError(f"{flag} must be one of {', '.join(known)}; got {value!r}")
        ring = self.size // (self.ulysses * self.outer)
        check_exchange(self.exchange, self.outer, ring)

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "RingOptions | None":
        """The options in parsed arguments; None where no --sequence-parallel-ring was given.

        Raises ValueError if the arguments contradict each other, or do not have the ring's at all,
        NotImplementedError for reinforcement learning, and what RingOptions raises.
        """
        if not hasattr(args, "sequence_parallel_ring"):
            raise ValueError(
                f"these arguments know no {_RING}: give add_ring_args to the parser as "
                f"extra_args_provider. A --yaml-cfg replaces all arguments; there start the script "
                f"with python -m ring_sp.integrations.megatron."
            )
        if args.sequence_parallel_ring is None:
            if asked := _companions(args):
                raise ValueError(f"{', '.join(asked)} needs {_RING}, which was not given")
            return None
        if getattr(args, "perform_rl_step", False):
            raise NotImplementedError(
                f"the ring has no --perform-rl-step, whose batches Megatron does not cut for a "
                f"ring's ranks; leave {_RING} out"
            )
        size = args.sequence_parallel_ring or args.context_parallel_size
        if size != args.context_parallel_size:
            raise ValueError(_conflict(size, args.context_parallel_size))
        given = (args.ring_layout, args.ring_kernel, args.ring_ulysses, args.ring_outer)
        return cls(size, *given, args.ring_exchange, args.ring_keep_attention, args.ring_ff_chunk)


def add_ring_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the ring's arguments to Megatron's parser: an extra_args_provider, to be chained with
    others.

    --sequence-parallel-ring N is the context-parallel size of what Megatron validates; a
    --context-parallel-size that says otherwise is an error, in either order.
    """
    # Megatron reads the size right after parsing, so that a conflict must be seen while parsing:
    # this group's --context-parallel-size takes the place of Megatron's.
    add = parser.add_argument_group("ring attention", conflict_handler="resolve").add_argument
    default = parser.get_default("context_parallel_size")
    add(
        _RING,
        nargs="?",
        const=_BARE,
        default=None,
        type=_positive,
        metavar="N",
        action=_Size,
        help=f"train with ring attention, N ranks a sequence; without N, {_CONTEXT} ranks",
    )
    add(
        _CONTEXT,
        type=_positive,
        default=1 if default is None else default,
        action=_Size,
        help="Degree of context parallelism.",
    )
    add("--ring-layout", choices=LAYOUTS, default="zigzag", help="which tokens a rank holds")
    kernels = ("auto", *KERNELS)
    add("--ring-kernel", choices=kernels, default="auto", help="attention kernel")
    add("--ring-ulysses", type=_positive, default=1, help="ranks that trade heads for sequence")
    add("--ring-outer", type=_positive, default=1, help="rings in a ring of rings, for slow links")
    add(
        "--ring-exchange",
        choices=EXCHANGES,
        default="messages",
        help="how a ring moves tensors; copies: by the copy engines of the GPUs of one host; "
        "gather:N: from N ranks at a time, for short sequences",
    )
    add(
        "--ring-keep-attention",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep attention's results where Megatron recomputes: a ring less, for one more tensor "
        "of the size of the queries for each layer that is recomputed",
    )
    add(
        "--ring-ff-chunk",
        type=_positive,
        metavar="TOKENS",
        help="compute dense feed-forwards so many tokens at a time, and again in backward",
    )
    return parser


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {text}")
    return int(text)


class _Size(argparse.Action):
    """--sequence-parallel-ring and --context-parallel-size, whichever comes last."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        del option_string
        given = {**getattr(namespace, "_ring_sizes_given", {}), self.dest: values}
        namespace._ring_sizes_given = given
        setattr(namespace, self.dest, values)
        ring, context = given.get("sequence_parallel_ring"), given.get("context_parallel_size")
        if ring and context is not None and ring != context:
            parser.error(_conflict(ring, context))
        if ring:
            namespace.context_parallel_size = ring


def _conflict(ring: int, context: int) -> str:
    return f"{_RING} {ring} and {_CONTEXT} {context} contradict each other; leave one out"


def _companions(args: argparse.Namespace) -> list[str]:
    """The ring's other arguments that differ from their defaults."""
    defaults = RingOptions()
    names = ("layout", "kernel", "ulysses", "outer", "exchange", "ff_chunk")
    given = {name: getattr(args, f"ring_{name}") for name in names}
    asked = [
        f"--ring-{name.replace('_', '-')} {value}"
        for name, value in given.items()
        if value != getattr(defaults, name)
    ]
    return asked if args.ring_keep_attention else [*asked, "--no-ring-keep-attention"]
