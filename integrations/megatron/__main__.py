"""Run a stock Megatron script with ring attention.

    torchrun ... -m ring_sp.integrations.megatron pretrain_gpt.py --sequence-parallel-ring 8 ...
    python -m ring_sp.integrations.megatron --report

The script sees --context-parallel-size; the ring's own arguments stay here.
"""

import argparse
import runpy
import sys
from pathlib import Path

from ring_sp.integrations.megatron.found import lines, look
from ring_sp.integrations.megatron.options import RingOptions, add_ring_args

_USAGE = (
    "python -m ring_sp.integrations.megatron [--report] SCRIPT --sequence-parallel-ring [N] ..."
)


def main(argv: list[str]) -> None:
    """Report, or run the script that `argv` starts with. Exits with a message for bad input."""
    if argv[:1] == ["--report"]:
        if argv[1:]:
            _at_home(argv[1])
        print("\n".join(lines(look())))
        return
    if not argv or argv[0].startswith("-"):
        sys.exit(f"usage: {_USAGE}")
    script = _at_home(argv[0])
    try:
        options, untested, rest = understood(argv[1:])
        found = look()
        found.refuse_untested(untested)
        found.refuse_foreign_apex()
    except (ValueError, NotImplementedError) as error:
        sys.exit(f"ring_sp: {error}")
    from ring_sp.integrations.megatron.installation import install

    made = install(options, untested=untested)
    sys.argv = [argv[0], *rest]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        made.remove()
    if made.ring is None:
        sys.exit(f"ring_sp: {script} built no model, so that nothing was trained with the ring")


def understood(given: list[str]) -> tuple[RingOptions, bool, list[str]]:
    """What a command line asks of the ring, whether for a Megatron that is not tested, and the
    arguments for the script. Raises ValueError where it asks for no ring, or contradicts itself,
    and NotImplementedError for a ring that there is not, or training that has none.
    """
    parser = argparse.ArgumentParser(_USAGE, allow_abbrev=False, add_help=False)
    add_ring_args(parser)
    parser.add_argument("--ring-untested-megatron", action="store_true")
    # Megatron's own, which options refuse.
    parser.add_argument("--perform-rl-step", action="store_true")
    args, rest = parser.parse_known_args(given)
    options = RingOptions.from_args(args)
    if options is None:
        raise ValueError("nothing asks for the ring: give --sequence-parallel-ring [N]")
    return (
        options,
        args.ring_untested_megatron,
        [
            *rest,
            "--context-parallel-size",
            str(options.size),
        ],
    )


def _at_home(name: str) -> Path:
    """A script's path; its folder goes first on sys.path, as Python does it: there may lie the
    Megatron that the script belongs to.
    """
    script = Path(name).resolve()
    if not script.is_file():
        sys.exit(f"ring_sp: there is no script {name}\nusage: {_USAGE}")
    sys.path[0] = str(script.parent)
    return script


if __name__ == "__main__":
    main(sys.argv[1:])
