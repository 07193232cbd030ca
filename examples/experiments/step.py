"""A training step as the planner counts it: bf16 weights, fp32 sums of gradients, and AdamW over
fp32 master weights and moments that all ranks divide among them.

`Training` runs one of RingTransformer, on GPUs or on CPUs; it says how long a step took and how
many bytes it needed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, cast

import torch
import torch.distributed as dist
from counted import Counted, HostMemory
from torch import Tensor, nn

from ring_sp import AttentionConfig, Checkpointing, RingTransformer, ShardedSequence, Topology
from ring_sp.job import Choice
from ring_sp.loss import cross_entropy_mean
from ring_sp.model_shape import ModelShape
from ring_sp.modules import Part, RingAttention
from ring_sp.offload import Offload
from ring_sp.rotary import Rotation, rotate

# Their names since torch 2.13, and before.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

CLIP, RATE, BETAS, DECAY = 1.0, 3e-4, (0.9, 0.95), 0.1


class VanillaAttention(nn.Module):
    """The attention of a layer with the scores of every pair, as in plain torch; of one rank."""

    def __init__(self, like: RingAttention) -> None:
        super().__init__()
        self.config = like.config
        self.wq, self.wk, self.wv, self.wo = like.wq, like.wk, like.wv, like.wo

    def attend(self, queries: Part, keys: Part, turn: Rotation | None) -> Tensor:
        """As `RingAttention.attend`, causal."""
        (x, _), (source, _), config = queries, keys, self.config
        q, k, v = (
            projected.unflatten(-1, (-1, config.head_size))
            for projected in (self.wq(x), self.wk(source), self.wv(source))
        )
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        times = config.num_heads // config.kv_heads
        q, k, v = (
            each.transpose(1, 2)
            for each in (q, k.repeat_interleave(times, 2), v.repeat_interleave(times, 2))
        )
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        scores = (q @ k.mT * config.head_size**-0.5).masked_fill(hidden, -torch.inf)
        out = scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
        return self.wo(out.transpose(1, 2).flatten(2))


@dataclass(frozen=True)
class Form:
    """What is trained and how: the planner's choice says what layers keep and what goes by chunks;
    `vanilla` has the scores of every pair.
    """

    model: ModelShape
    choice: Choice
    vanilla: bool = False


def build(form: Form, topology: Topology) -> RingTransformer:
    """The model on the meta device: shapes alone. Raises ValueError for a shape that
    RingTransformer does not have.
    """
    model, choice = form.model, form.choice
    if not model.gated:
        raise ValueError(f"{model.name}: RingTransformer's feed-forward is gated, SwiGLU")
    config = AttentionConfig(model.hidden, model.heads, model.kv_heads, model.head_dim)
    with torch.device("meta"):
        built = RingTransformer(
            model.vocab,
            model.layers,
            config,
            model.ffn / model.hidden,
            tied=model.tied,
            topology=topology,
            layout=choice.layout,
            checkpointing=checkpointing(choice),
            feed_forward_chunk=choice.ff_chunk,
            loss_chunk=choice.loss_chunk,
        )
        if form.vanilla:
            for block in built.blocks:
                block.attention = VanillaAttention(cast(RingAttention, block.attention))
    return built


def checkpointing(choice: Choice) -> Checkpointing | None:
    """The planner's choice in the words of RingTransformer."""
    if choice.checkpoint == "none":
        return None
    return Checkpointing(choice.every, choice.checkpoint == "selective", choice.offload)


@dataclass(frozen=True)
class Measured:
    """A step of this rank: seconds by part, most bytes of tensors at once, and of what the
    allocator held; the loss in nats a token.
    """

    seconds: dict[str, float]
    peak_bytes: int
    held_bytes: int
    loss: float


class Training:
    """A model, its optimizer and its step, on this rank. All ranks of the world make one together:
    each ring trains a sequence of its own, and gradients are summed over all.
    """

    def __init__(
        self, form: Form, topology: Topology, device: torch.device, counted: Counted | None = None
    ) -> None:
        """`counted` counts bytes where there is no CUDA; it must be active already."""
        self.form, self.topology, self.device, self.counted = form, topology, device, counted
        self.reset_peak()
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.model = build(form, topology)
        if counted is not None and form.choice.offload:
            self.model.offload = Offload(lane=lambda _: HostMemory(counted))
        self._place()
        self.optimizer = torch.optim.AdamW(
            [self.master], RATE, BETAS, weight_decay=DECAY, fused=True
        )
        self._make_moments()

    def _make_moments(self) -> None:
        """A step without a gradient: torch makes the moments in the first one, after its peak."""
        self.master.grad, rate = torch.zeros_like(self.master), self.optimizer.param_groups[0]
        rate["lr"] = 0.0
        self.optimizer.step()
        self.master.grad, rate["lr"] = None, RATE

    def _place(self) -> None:
        """Weights as views of one bf16 buffer, the same on every rank; gradients of a float32 one;
        this rank's share of master weights.
        """
        shapes = {p: p.shape for p in self.model.parameters()}
        numel = sum(shape.numel() for shape in shapes.values())
        share = -(-numel // self.size)
        make = torch.Generator(self.device).manual_seed(0)
        options: dict[str, Any] = {"device": self.device}
        self.weights = torch.empty(share * self.size, dtype=torch.bfloat16, **options)
        self.weights.normal_(std=0.02, generator=make)
        self.gradients = torch.zeros(share * self.size, dtype=torch.float32, **options)
        placed: dict[nn.Parameter, nn.Parameter] = {}
        start = 0
        for parameter, shape in shapes.items():
            at = slice(start, start + shape.numel())
            weight = nn.Parameter(self.weights[at].view(shape))
            if weight.dim() == 1:
                weight.data.fill_(1)  # A norm's.
            weight.register_post_accumulate_grad_hook(_adds_to(self.gradients[at].view(shape)))
            placed[parameter], start = weight, at.stop
        for module in self.model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, placed[parameter])
        self.own = slice(self.rank * share, (self.rank + 1) * share)
        self.master = nn.Parameter(self.weights[self.own].float())

    def run(self, seq_len: int, seed: int = 0) -> Measured:
        """One step over a sequence of random tokens for each ring. Collective over the world."""
        clock = Clock(self.device)
        self.reset_peak(empty=False)  # Memory that is asked of the device anew takes long.
        loss = self.differentiate(seq_len, seed, clock)
        self.update(clock)
        return Measured(clock.seconds(), *self.peaks(), loss.item())

    def differentiate(self, seq_len: int, seed: int, clock: "Clock") -> Tensor:
        """The loss of a sequence, and its gradients added to the sums. Collective over the ring."""
        sequence = ShardedSequence(seq_len, self.topology, layout=self.form.choice.layout)
        ring = self.rank // self.topology.size
        make = torch.Generator(self.device).manual_seed((seed << 16) + ring)
        words = self.form.model.vocab
        tokens, labels = (
            sequence.shard(torch.randint(words, (1, seq_len), generator=make, device=self.device))
            for _ in range(2)
        )
        with clock.part("forward"):
            loss = self._loss(tokens, labels, sequence)
        with clock.part("backward"):
            loss.backward()
        return loss.detach()

    def update(self, clock: "Clock") -> None:
        """AdamW with the gradients of all ranks. Collective over the world."""
        with clock.part("sums"):
            if self.size > 1:
                _reduce_scatter(self.gradients[self.own], self.gradients)
        with clock.part("optimizer"):
            self._update()
            self.forget()

    def forget(self) -> None:
        """Begin the sums of gradients again."""
        self.gradients.zero_()

    def _loss(self, tokens: Tensor, labels: Tensor, sequence: ShardedSequence) -> Tensor:
        """The mean of the sequence; its gradient is that of this rank's tokens."""
        if self.form.choice.loss_chunk is None:
            group = self.topology.group if self.topology.size > 1 else None
            return cross_entropy_mean(self.model.local(tokens, None, sequence), labels, group)
        return self.model.local(tokens, labels, sequence)

    def _update(self) -> None:
        """AdamW on this rank's share, and the new weights from all ranks."""
        rings = self.size // self.topology.size
        own = self.gradients[self.own]
        square = own.norm().square()
        if self.size > 1:
            dist.all_reduce(square)
        # The mean over the rings' sequences, and clipped.
        own *= (CLIP / (square.sqrt() / rings + 1e-6)).clamp_max(1) / rings
        self.master.grad = own
        self.optimizer.step()
        self.weights[self.own].copy_(self.master.detach())
        if self.size > 1:
            _all_gather(self.weights, self.weights[self.own])
        self.master.grad = None

    def reset_peak(self, empty: bool = True) -> None:
        """`empty` if what the allocator holds and nobody uses goes back to the device."""
        if self.counted is not None:
            self.counted.reset_peak()
        elif self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            if empty:
                torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peaks(self) -> tuple[int, int]:
        """Most bytes of tensors at once, and of what the allocator held, since `reset_peak`."""
        if self.counted is not None:
            return self.counted.peak, self.counted.peak
        if self.device.type == "cuda":
            peaks = torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved
            return peaks[0](self.device), peaks[1](self.device)
        return 0, 0


def _adds_to(total: Tensor) -> Any:
    """A hook that adds a parameter's gradient to a float32 sum and lets it go."""

    def hook(parameter: Tensor) -> None:
        total.add_(cast(Tensor, parameter.grad))
        parameter.grad = None

    return hook


class Clock:
    """Times parts of a step on the device, without waiting for it in between."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._parts: dict[str, tuple[Any, Any]] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        begin = self._now()
        yield
        self._parts[name] = begin, self._now()

    def seconds(self) -> dict[str, float]:
        """Of each part; waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
            return {name: a.elapsed_time(b) / 1e3 for name, (a, b) in self._parts.items()}
        return {name: end - begin for name, (begin, end) in self._parts.items()}

    def _now(self) -> Any:
        if not self._cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
