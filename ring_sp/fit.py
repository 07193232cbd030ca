"""Whether the tensors of a call fit each other and their sequences: what is needed, what came."""

from collections.abc import Hashable
from math import inf, isfinite
from typing import NamedTuple, cast

from torch import SymInt, Tensor, are_deterministic_algorithms_enabled

from ring_sp.agreement import agree, agreed, refusal
from ring_sp.kernels import Call, Kernel, select
from ring_sp.kernels.contract import accumulation_dtype
from ring_sp.masks import causal
from ring_sp.plan import Plan
from ring_sp.sequence import ShardedSequence
from ring_sp.ulysses import kv_replication

KEPT_CALLS = 1000
"""Calls that a sequence remembers."""


class Options(NamedTuple):
    """What a call of `ring_attention` asks for besides its tensors."""

    scale: float | None = None
    softcap: float | None = None
    dropout_p: float = 0.0
    dropout_seed: int | None = None
    kernel: str = "auto"
    return_lse: bool = False


def fitting_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequence: ShardedSequence,
    keys: ShardedSequence,
    sinks: Tensor | None,
    options: Options,
    trained: bool,
) -> Kernel:
    """The kernel that serves a call, `trained` if any of its tensors gets a gradient.

    Raises ValueError or NotImplementedError if the call does not fit: on every rank in the first
    call with these options over these sequences, later where it is seen. Costs a lookup once such a
    call has passed.
    """
    _check_kinds(sequence, keys)
    seed = options.dropout_seed
    # A seed is new in each call: whether it is one is looked at in each, whether all ranks have the
    # same in the first.
    steady = ", ".join(f"{n}={x}" for n, x in options._asdict().items() if n != "dropout_seed")
    asked = f"{steady}, gradients {trained}, deterministic {are_deterministic_algorithms_enabled()}"
    asked += f", sums in {sequence.topology.sums_dtype}"
    asked += f", over {sequence.place}, keys of {keys.place}"
    call = *map(_seen, (q, k, v, sinks)), keys.topology, asked, _seeds(options.dropout_p, seed)
    kernel, terms = sequence.served.get(call, (None, ""))
    if kernel is None or not agreed(sequence.topology, terms):
        found: list[Kernel] = []
        all_given = q, k, v, sequence, keys, sinks, options, trained
        error = refusal(lambda: found.append(select(options.kernel, fitting_call(*all_given))))
        tensors = zip(("q", "k", "v", "sinks"), (q, k, v, sinks), strict=True)
        terms = ", ".join([*(f"{name} {_shared(x)}" for name, x in tensors), asked])
        terms += f", kernel {found[0].__name__}" if found else ""
        device_type = "cpu" if error else q.device.type
        agree(sequence.topology, asked, terms, error, device_type, f", dropout_seed={seed}")
        (kernel,) = found
        if len(sequence.served) >= KEPT_CALLS:
            sequence.served.clear()
        sequence.served[call] = kernel, terms
    return cast(Kernel, kernel)


def typed(
    q: object,
    k: object,
    v: object,
    sequence: object,
    keys: object,
    sinks: object,
    options: Options,
) -> bool:
    """Whether the arguments have the types of torch's operators, and their tensors one device: with
    one on "meta" an operator would be asked for nothing but shapes.
    """
    return (
        all(isinstance(x, Tensor) and x.dim() == 4 for x in (q, k, v))
        and len({x.device for x in (q, k, v, sinks) if isinstance(x, Tensor)}) == 1
        and all(isinstance(x, ShardedSequence) for x in (sequence, keys))
        and (sinks is None or isinstance(sinks, Tensor))
        and all(isinstance(x, int | float | None) for x in (options.scale, options.softcap))
        and isinstance(options.dropout_p, int | float)
        and isinstance(options.dropout_seed, int | SymInt | None)
        and (options.dropout_seed is None or abs(options.dropout_seed) < 1 << 63)
        and isinstance(options.kernel, str)
        and isinstance(options.return_lse, bool)
    )


def agree_on_scores(
    q: Tensor, k: Tensor, sequence: ShardedSequence, keys: ShardedSequence, options: Options
) -> None:
    """Raise for queries and keys that do not fit, as `fitting_kernel` does for a call."""
    _check_kinds(sequence, keys)
    asked = f"largest scores, scale={options.scale}, softcap={options.softcap}"
    asked += f", over {sequence.place}, keys of {keys.place}"
    call = _seen(q), _seen(k), keys.topology, asked
    terms = sequence.served.get(call)
    if terms is None or not agreed(sequence.topology, terms):
        error = refusal(lambda: fitting_call(q, k, None, sequence, keys, None, options, False))
        terms = f"q {_shared(q)}, k {_shared(k)}, {asked}"
        agree(sequence.topology, asked, terms, error, "cpu" if error else q.device.type)
        if len(sequence.served) >= KEPT_CALLS:
            sequence.served.clear()
        sequence.served[call] = terms


def kernel_for(
    q: Tensor, v_head_dim: int, plan: Plan, options: Options, lse_gradient: bool
) -> Kernel:
    """The kernel for gradients of queries like `q`. Raises ValueError if none can serve them."""
    return select(options.kernel, _call(q, v_head_dim, plan, options, lse_gradient, True))


def _seen(x: object) -> Hashable:
    """What of an argument decides whether it fits."""
    if isinstance(x, Tensor):
        return x.shape, x.dtype, x.device
    return type(x).__name__


def _shared(x: object) -> str:
    """What of an argument must be the same on every rank."""
    if not isinstance(x, Tensor):
        return type(x).__name__
    return f"{list(x.shape[:1])} x tokens x {list(x.shape[2:])} {x.dtype} on {x.device.type}"


def fitting_call(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    sequence: ShardedSequence,
    keys: ShardedSequence,
    sinks: Tensor | None,
    options: Options,
    trained: bool,
) -> Call:
    """What a kernel must know of a call that is right as far as this rank can see; raises
    ValueError or NotImplementedError if it is not. Without `v` only scores are asked for.
    """
    _check_kinds(sequence, keys)
    _check_options(options)
    _check_sequences(sequence, keys)
    _check_tensors({"q": q, "k": k} if v is None else {"q": q, "k": k, "v": v})
    _check_lengths(q, k, sequence, keys)
    _check_exchange(q, sequence, options)
    heads = q.shape[2]
    if sinks is not None and not (
        isinstance(sinks, Tensor) and sinks.shape == (heads,) and sinks.device == q.device
    ):
        came = f"{list(sinks.shape)} on {sinks.device}" if isinstance(sinks, Tensor) else sinks
        raise ValueError(
            f"sinks must be a tensor [{heads}] on {q.device}, one logit for each query head; "
            f"got {came}"
        )
    kv_replication(heads, k.shape[2], sequence.topology.ulysses.size)
    lse_gradient = trained and (options.return_lse or sinks is not None)
    v_head_dim = (k if v is None else v).shape[3]
    return _call(q, v_head_dim, sequence.plan(keys), options, lse_gradient, trained)


def _call(
    q: Tensor, v_head_dim: int, plan: Plan, options: Options, lse_gradient: bool, trained: bool
) -> Call:
    return Call(
        q.device.type,
        q.dtype,
        q.shape[3],
        v_head_dim,
        softcap=options.softcap is not None,
        scale=q.shape[3] ** -0.5 if options.scale is None else options.scale,
        windowed=plan.windowed,
        num_regions=plan.num_regions,
        lse_gradient=lse_gradient,
        dropout=options.dropout_p > 0,
        deterministic=trained and are_deterministic_algorithms_enabled(),
    )


def _check_kinds(sequence: ShardedSequence, keys: ShardedSequence) -> None:
    for name, given in (("sequence", sequence), ("kv_sequence", keys)):
        if not isinstance(given, ShardedSequence):
            raise ValueError(f"{name} must be a ShardedSequence; got {type(given)}")


def _check_options(options: Options) -> None:
    scale, softcap = options.scale, options.softcap
    if scale is not None and not (isinstance(scale, int | float) and isfinite(scale)):
        raise ValueError(f"scale must be None or a finite number; got {scale}")
    if softcap is not None and not (isinstance(softcap, int | float) and 0 < softcap < inf):
        raise ValueError(f"softcap must be None or a finite number above 0; got {softcap}")
    p, seed = options.dropout_p, options.dropout_seed
    if not (isinstance(p, int | float) and 0 <= p < 1):
        raise ValueError(f"dropout needs 0 <= dropout_p < 1; got dropout_p={p}")
    if not _seeds(p, seed):
        raise ValueError(
            f"dropout_p={p} needs an int from 0 to 2**63 - 1 as dropout_seed, one for all ranks of "
            f"the sequence and another for each layer and step; got {seed!r}"
        )


def _seeds(p: float, seed: object) -> bool:
    """Whether a seed, or none, goes with a probability of dropout."""
    if seed is None:
        return p == 0
    return isinstance(seed, int) and 0 <= seed < 1 << 63


def _check_sequences(sequence: ShardedSequence, keys: ShardedSequence) -> None:
    if keys.topology != sequence.topology:
        raise ValueError(
            "kv_sequence must live on the same topology as the sequence of the queries"
        )
    if keys.mask not in (causal(), sequence.mask):
        raise ValueError(
            f"the mask {sequence.mask} of the queries' sequence rules over both; the {keys.mask} "
            f"of kv_sequence would be ignored. Leave it out, and say the mask there."
        )
    plan = sequence.plan(keys)
    for number in plan.own_visits:
        plan.tiles(number)


def _check_exchange(q: Tensor, sequence: ShardedSequence, options: Options) -> None:
    topology, dtype = sequence.topology, q.dtype
    sums_dtype = topology.sums_dtype
    if topology.exchange == "copies" and q.device.type not in {"cuda", "meta"}:
        raise ValueError(
            f"a topology built with exchange='copies' moves tensors on GPUs; got {q.device}"
        )
    if options.dropout_p and sequence.seq_len >= 1 << 31:
        raise NotImplementedError(
            f"dropout counts positions below 2**31; got a sequence of {sequence.seq_len} tokens"
        )
    if sums_dtype not in (None, dtype, accumulation_dtype(dtype)):
        raise ValueError(
            f"sums_dtype must be None, {dtype} or {accumulation_dtype(dtype)} for q of {dtype}; "
            f"the topology was built with {sums_dtype}"
        )


def _check_tensors(tensors: dict[str, Tensor]) -> None:
    for name, x in tensors.items():
        if not isinstance(x, Tensor) or x.dim() != 4 or 0 in x.shape:
            raise ValueError(
                f"{name} must be [batch, tokens, heads, head dim], none of them 0; got "
                f"{tuple(x.shape) if isinstance(x, Tensor) else type(x)}"
            )
    q, k, *values = tensors.values()
    v, names = (values[0], "q, k and v") if values else (k, "q and k")
    heads, kv_heads = q.shape[2], k.shape[2]
    needs = (
        (
            q.dtype.is_floating_point and q.dtype == k.dtype == v.dtype,
            f"{names} must share one floating-point dtype",
        ),
        (q.device == k.device == v.device, f"{names} must be on one device"),
        (q.shape[0] == k.shape[0] == v.shape[0], f"{names} must have one batch size"),
        (k.shape[1:3] == v.shape[1:3], "k and v must have the same tokens and heads"),
        (q.shape[3] == k.shape[3], "q and k must have one head dimension"),
        (
            heads % kv_heads == 0,
            f"the key heads must divide the query heads; {kv_heads} does not divide {heads}",
        ),
    )
    failed = next((need for met, need in needs if not met), None)
    if failed:
        came = (f"{name} {tuple(x.shape)} {x.dtype} on {x.device}" for name, x in tensors.items())
        raise ValueError(f"{failed}. Got {', '.join(came)}.")


def _check_lengths(q: Tensor, k: Tensor, sequence: ShardedSequence, keys: ShardedSequence) -> None:
    if q.shape[1] != sequence.local_len:
        raise ValueError(
            f"q must hold this rank's {sequence.local_len} tokens of {sequence}; got shape "
            f"{tuple(q.shape)}. Cut the whole sequence with sequence.shard."
        )
    if k.shape[1] != keys.local_len:
        raise ValueError(
            f"k and v must hold this rank's {keys.local_len} tokens of {keys}; got shape "
            f"{tuple(k.shape)}. For keys of another length give kv_sequence."
        )
