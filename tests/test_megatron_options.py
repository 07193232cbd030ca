import argparse
import importlib.util
import sys

import pytest

from ring_sp.integrations.megatron.options import RingOptions, add_ring_args


def parser() -> argparse.ArgumentParser:
    """What of Megatron's parser the ring's arguments meet."""
    stock = argparse.ArgumentParser(allow_abbrev=False)
    group = stock.add_argument_group("parallelism")
    group.add_argument("--context-parallel-size", type=int, default=1)
    group.add_argument("--sequence-parallel", action="store_true")
    return add_ring_args(stock)


def parsed(line: str) -> argparse.Namespace:
    return parser().parse_args(line.split())


@pytest.mark.parametrize(
    ("line", "size", "context"),
    [
        ("", None, 1),
        ("--context-parallel-size 4", None, 4),
        ("--sequence-parallel-ring 4", 4, 4),
        ("--sequence-parallel-ring=4 --sequence-parallel", 4, 4),
        ("--sequence-parallel-ring", 1, 1),
        ("--sequence-parallel-ring --context-parallel-size 4", 4, 4),
        ("--context-parallel-size 4 --sequence-parallel-ring", 4, 4),
        ("--context-parallel-size 4 --sequence-parallel-ring 4", 4, 4),
    ],
)
def test_the_flag_sets_the_context_parallel_size(line: str, size: int | None, context: int) -> None:
    args = parsed(line)
    options = RingOptions.from_args(args)
    assert args.context_parallel_size == context
    assert (options.size if options else None) == size
    assert args.sequence_parallel == ("--sequence-parallel" in line.split())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "--context-parallel-size 1 --sequence-parallel-ring 2",
            "ring 2 and --context-parallel-size 1 contradict",
        ),
        (
            "--sequence-parallel-ring 2 --context-parallel-size 4",
            "ring 2 and --context-parallel-size 4 contradict",
        ),
        ("--sequence-parallel-ring 0", "must be at least 1; got 0"),
        ("--sequence-parallel-ring two", "invalid"),
        ("--sequence-parallel-rin 2", "unrecognized arguments"),
        ("--sequence-parallel-ring 2 --ring-layout spiral", "'spiral'"),
        ("--sequence-parallel-ring 2 --ring-kernel fast", "'fast'"),
        ("--sequence-parallel-ring 2 --ring-exchange mail", "'mail'"),
        ("--sequence-parallel-ring 2 --ring-exchange gather:0", "'gather:0'"),
        ("--sequence-parallel-ring 2 --ring-ff-chunk 0", "must be at least 1; got 0"),
    ],
)
def test_what_contradicts_itself_is_refused_while_parsing(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parsed(line)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--ring-layout striped", "--ring-layout striped needs --sequence-parallel-ring"),
        ("--no-ring-keep-attention", "--no-ring-keep-attention needs --sequence-parallel-ring"),
        ("--ring-ff-chunk 64", "--ring-ff-chunk 64 needs --sequence-parallel-ring"),
        ("--sequence-parallel-ring 4 --ring-ulysses 3", "--ring-ulysses 3 must divide the 4"),
        ("--sequence-parallel-ring 4 --ring-ulysses 2 --ring-outer 4", "--ring-outer 4 x"),
    ],
)
def test_options_that_do_not_fit_each_other_are_refused(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RingOptions.from_args(parsed(line))


@pytest.mark.parametrize("exchange", ["copies", "gather", "gather:3"])
def test_an_exchange_is_named_with_its_number(exchange: str) -> None:
    line = f"--sequence-parallel-ring 4 --ring-exchange {exchange}"
    assert RingOptions.from_args(parsed(line)) == RingOptions(4, exchange=exchange)


def test_a_gather_in_a_ring_of_rings_is_refused_before_groups_are_built() -> None:
    line = "--sequence-parallel-ring 4 --ring-outer 2 --ring-exchange gather:2"
    with pytest.raises(NotImplementedError, match="got outer 2 x ring 2"):
        RingOptions.from_args(parsed(line))


def test_what_is_recomputed_is_said_by_two_flags() -> None:
    ring = "--sequence-parallel-ring 2"
    assert RingOptions.from_args(parsed(ring)) == RingOptions(2)
    line = f"{ring} --no-ring-keep-attention --ring-ff-chunk 4096"
    wanted = RingOptions(2, keep_attention=False, ff_chunk=4096)
    assert RingOptions.from_args(parsed(line)) == wanted
    with pytest.raises(ValueError, match="--ring-ff-chunk must be at least 1; got 0"):
        RingOptions(2, ff_chunk=0)


def test_a_size_changed_after_parsing_is_refused() -> None:
    args = parsed("--sequence-parallel-ring 4")
    args.context_parallel_size = 2
    with pytest.raises(ValueError, match="ring 4 and --context-parallel-size 2 contradict"):
        RingOptions.from_args(args)


def test_arguments_that_do_not_know_the_ring_are_refused() -> None:
    with pytest.raises(ValueError, match="--yaml-cfg replaces all arguments"):
        RingOptions.from_args(argparse.Namespace(context_parallel_size=4))


TRAINING = importlib.util.find_spec("megatron") and importlib.util.find_spec("megatron.training")


@pytest.mark.skipif(
    not TRAINING or sys.version_info < (3, 12),
    reason="needs megatron.training, which is in megatron-core from 0.17 on and wants Python 3.12",
)
def test_megatrons_own_parser_takes_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.training.arguments import parse_args

    stock = ["train.py", "--sequence-parallel", "--sequence-parallel-ring", "4"]
    monkeypatch.setattr("sys.argv", stock)
    args = parse_args(add_ring_args)
    assert (args.context_parallel_size, args.sequence_parallel) == (4, True)
    assert RingOptions.from_args(args) == RingOptions(4)
    monkeypatch.setattr("sys.argv", [*stock, "--context-parallel-size", "2"])
    with pytest.raises(SystemExit):
        parse_args(add_ring_args)
