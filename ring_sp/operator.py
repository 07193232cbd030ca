"""Attention over ranks as one operator of torch, `ring_sp::attention`.

The compiler takes it as it is, without a break in its graph, and a policy of selective activation
checkpointing can keep its results, so that recomputation does not go round the ring again. A graph
holds tensors and numbers only: sequences go by their number.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.forward_ad import unpack_dual

from ring_sp.fit import Options, fitting_kernel, kernel_for, typed
from ring_sp.kept import Result, current
from ring_sp.kernels import Kernel
from ring_sp.kernels.contract import Rows, accumulation_dtype
from ring_sp.passes import Drops, Setting, Wire, attend, gradients
from ring_sp.sequence import ShardedSequence, numbered
from ring_sp.ulysses import kv_replication, to_heads, to_sequence

_OPTIONS = (
    "float? scale, float? softcap, float dropout_p, SymInt? dropout_seed, str kernel, "
    "bool return_lse"
)
_PLACE = "int sequence, int kv_sequence, int peers"


def operate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequence: ShardedSequence,
    keys: ShardedSequence,
    sinks: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """out and lse of `ring_attention`, but for sinks, whose shape alone is looked at. Raises as it
    does.
    """
    trained = torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in (q, k, v, sinks)
    )
    if not typed(q, k, v, sequence, keys, sinks, options):
        # What torch's operators would not even take; nothing comes back from here.
        fitting_kernel(q, k, v, sequence, keys, sinks, options, trained)
    traced = torch.compiler.is_compiling()
    if not traced and any(unpack_dual(x).tangent is not None for x in (q, k, v)):
        # torch drops the tangents of an operator that has no formula for them.
        raise NotImplementedError("ring attention has no forward-mode derivative; use backward")
    store, call = None if traced else current(), None
    if store:
        # By what they say: the stretch may make its sequences itself, others each time.
        call = sequence.place, keys.place, q.shape, k.shape, v.shape, q.dtype, options
    known = store and store.take(call)
    place = sequence.number, keys.number, sequence.topology.ulysses.size
    asked = q, k, v, sinks, *place, *options, trained
    found = _Known.apply(known, *asked) if known else torch.ops.ring_sp.attention(*asked)
    out, lse, *_ = found
    if store:
        store.put(call, (out.detach(), lse.detach()))
    return out, lse


@torch.library.custom_op(
    "ring_sp::attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor? sinks, {_PLACE}, {_OPTIONS}, bool trained)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *asked: Any
) -> tuple[Tensor, ...]:
    """(out, lse), and for the backward kv as it travels and, from Ulysses peers, (q, out, lse) as
    the ring sees them: all tokens of the peers, this peer's heads.
    """
    with torch.cuda.device_of(q):  # Triton launches on the current device, wherever tensors are.
        return _results(None, q, k, v, sinks, *asked)


def _results(
    known: Result | None, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *asked: Any
) -> tuple[Tensor, ...]:
    """What `attention` gives, around (out, lse) that are known, or are computed."""
    number, kv_number, peers, *options, trained = asked
    sequence, keys = numbered(number), numbered(kv_number)
    chosen = fitting_kernel(q, k, v, sequence, keys, sinks, Options(*options), trained)
    ulysses, lens = sequence.topology.ulysses, sequence.peer_lens
    copies = kv_replication(q.shape[2], k.shape[2], peers)
    if copies > 1:
        k, v = (x.repeat_interleave(copies, 2) for x in (k, v))
    q, k, v = to_heads(q, ulysses, lens), *(to_heads(x, ulysses, keys.peer_lens) for x in (k, v))
    q, wire = dense(q), Wire.of(k, v)
    kv = wire.join(k, v)
    if known is None:
        out, lse = attend(q, kv, wire, _setting(sequence, keys, chosen, Options(*options), q))
        # Some kernels lay out as q is; the compiler was promised, and checks, that it is dense.
        out = out.contiguous()
        whole = to_sequence(rows_first(lse), ulysses, lens)
        own = (out, lse) if peers == 1 else (to_sequence(out, ulysses, lens), _heads_first(whole))
    else:
        own = known
        out = to_heads(known[0], ulysses, lens)
        lse = _heads_first(to_heads(rows_first(known[1]), ulysses, lens))
    traded = (q, out, lse) if peers > 1 else (q.new_empty(0) for _ in range(3))
    return *own, kv, *traded


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    _sinks: Tensor | None,
    number: int,
    kv_number: int,
    peers: int,
    *_asked: Any,
) -> tuple[Tensor, ...]:
    batch, rows, heads, _ = q.shape
    lse = q.new_empty(batch, heads, rows, dtype=accumulation_dtype(q.dtype))
    out = q.new_empty(batch, rows, heads, v.shape[3])
    if peers == 1:
        return out, lse, k.new_empty(k.numel() + v.numel()), *(q.new_empty(0) for _ in range(3))
    rows, keys = (sum(numbered(int(each)).peer_lens) for each in (number, kv_number))
    groups = max(k.shape[2] * kv_replication(heads, k.shape[2], peers) // peers, 1)
    shape = batch, rows, heads // peers
    return (
        out,
        lse,
        q.new_empty(batch * keys * groups * (k.shape[3] + v.shape[3])),
        q.new_empty(*shape, q.shape[3]),
        q.new_empty(*shape, v.shape[3]),
        lse.new_empty(batch, shape[2], rows),
    )


@torch.library.custom_op(
    "ring_sp::attention_backward",
    mutates_args=(),
    schema="(Tensor? dout, Tensor? dlse, Tensor q, Tensor kv, Tensor out, Tensor lse, "
    f"{_PLACE}, int kv_heads, bool lse_gradient, {_OPTIONS}) -> (Tensor, Tensor)",
)
def attention_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    kv: Tensor,
    out: Tensor,
    lse: Tensor,
    *asked: Any,
) -> tuple[Tensor, Tensor]:
    """dq, and dk and dv as one 1-D tensor: of this rank's tokens, all heads."""
    number, kv_number, peers, kv_heads, lse_gradient, *others = asked
    sequence, keys, options = numbered(number), numbered(kv_number), Options(*others)
    ulysses, lens = sequence.topology.ulysses, sequence.peer_lens
    if dout is not None:
        dout = to_heads(dout, ulysses, lens)
    if dlse is not None:
        dlse = _heads_first(to_heads(rows_first(dlse), ulysses, lens))
    dout = torch.zeros_like(out) if dout is None else dense(dout)
    plan = sequence.plan(keys)
    q = dense(q)
    copies = kv_replication(q.shape[2] * peers, kv_heads, peers)
    wire = Wire(q.shape[0], kv_heads * copies // peers, q.shape[3], out.shape[3])
    chosen = kernel_for(q, out.shape[3], plan, options, lse_gradient)
    setting = _setting(sequence, keys, chosen, options, q)
    with torch.cuda.device_of(q):
        dq, dkv = gradients(q, kv, wire, Rows(out, lse, dout, dlse), setting)
    if peers == 1:
        return dq.contiguous(), dkv
    dk, dv = (
        to_sequence(x, ulysses, keys.peer_lens).unflatten(2, (kv_heads, copies)).sum(3)
        for x in wire.split(dkv)
    )
    return to_sequence(dq, ulysses, lens), Wire.of(dk, dv).join(dk, dv)


@attention_backward.register_fake
def _(
    _dout: Tensor | None,
    _dlse: Tensor | None,
    q: Tensor,
    kv: Tensor,
    out: Tensor,
    _lse: Tensor,
    *asked: Any,
) -> tuple[Tensor, Tensor]:
    number, kv_number, peers, kv_heads, *_ = asked
    batch, rows, heads, head_dim = q.shape
    if peers == 1:
        return q.new_empty(q.shape), torch.empty_like(kv)
    rows, key_rows = (numbered(int(each)).local_len for each in (number, kv_number))
    dims = head_dim + out.shape[3]
    return (
        q.new_empty(batch, rows, heads * peers, head_dim),
        kv.new_empty(batch * key_rows * kv_heads * dims),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, sinks, number, kv_number, peers, *options, trained = inputs
    out, lse, kv, *traded = output
    ctx.save_for_backward(*([q, kv, out, lse] if peers == 1 else [traded[0], kv, *traded[1:]]))
    lse_gradient = trained and (Options(*options).return_lse or sinks is not None)
    ctx.asked = number, kv_number, peers, k.shape[2], lse_gradient, *options
    ctx.shapes = k.shape, v.shape
    if not torch.compiler.is_compiling():
        ctx.alive = numbered(number), numbered(kv_number)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    unasked = (None,) * 11
    if dout is None and dlse is None:
        return None, None, None, *unasked
    q, kv, out, lse = ctx.saved_tensors
    dq, dkv = torch.ops.ring_sp.attention_backward(dout, dlse, q, kv, out, lse, *ctx.asked)
    dk, dv = dkv.split([shape.numel() for shape in ctx.shapes])
    return dq, dk.view(ctx.shapes[0]), dv.view(ctx.shapes[1]), *unasked


def _refuse(*_: Any) -> None:
    raise NotImplementedError("ring attention has no second derivative")


class _Known(torch.autograd.Function):
    """`attention` with its (out, lse) known: a recomputation, which keeps what a backward needs.

    No operator, since none may give what it was given, and a copy of out would be one too many.
    """

    @staticmethod
    def forward(known: Result, *asked: Any) -> tuple[Tensor, ...]:
        out, lse = known
        return _results((out.detach(), lse.detach()), *asked)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _keep(ctx, inputs[1:], output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return None, *_differentiate(ctx, *grads)


attention.register_autograd(_differentiate, setup_context=_keep)
attention_backward.register_autograd(_refuse)


def _setting(
    sequence: ShardedSequence,
    keys: ShardedSequence,
    kernel: Kernel,
    options: Options,
    q: Tensor,
) -> Setting:
    """For queries with the heads that the ring sees."""
    heads, head_dim = q.shape[2:]
    scale = head_dim**-0.5 if options.scale is None else options.scale
    topology, drops = sequence.topology, None
    if options.dropout_p and options.dropout_seed is not None:
        peers, seed = topology.ulysses, options.dropout_seed
        drops = Drops(options.dropout_p, seed, peers.rank * heads, peers.size * heads, q.device)
    plan, travels = sequence.plan(keys), topology.sums_dtype
    return Setting(plan, kernel, scale, options.softcap, travels, drops)


def dense(x: Tensor) -> Tensor:
    """`x`, dense in its last dimension and, where its head dim allows it, with each head of each
    token at a multiple of 16 bytes, as kernels want it.
    """
    size = x.element_size()
    start = size * x.storage_offset() if isinstance(x, FakeTensor) else x.data_ptr()
    places = start, *(size * stride for stride in x.stride()[:3])
    aligned = x.shape[3] * size % 16 or not any(place % 16 for place in places)
    if x.stride(3) == 1 and aligned:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def rows_first(lse: Tensor) -> Tensor:
    """[B, H, S] -> [B, S, H, 1]."""
    return lse.transpose(1, 2).unsqueeze(3)


def _heads_first(lse: Tensor) -> Tensor:
    """[B, S, H, 1] -> [B, H, S], dense."""
    return lse.squeeze(3).transpose(1, 2).contiguous()
