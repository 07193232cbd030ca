"""Steps of tiny models under DeepSpeed, and what one process makes of the same batches."""

import logging
import os
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from hf_models import Batch, Case, batch, built, exact, gradients
from ranks import groups
from ringed import relative
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from ring_sp import attention_kept
from ring_sp.integrations.deepspeed import (
    NAME,
    DeepSpeedRing,
    RingBlock,
    RingMPU,
    host_config,
    initialize,
)
from ring_sp.integrations.huggingface import use_ring_attention

PRECISION = 1e-5
"""Of float32, relative: of losses, norms, and weights after the last step."""
STEPS, LR, MOMENTUM, CLIP = 2, 0.01, 0.9, 0.5


@dataclass(frozen=True)
class Run:
    """A model, how it is spread, and what of DeepSpeed is on."""

    family: str = "Llama"
    stage: int = 0
    ring: int = 2
    layout: str = "zigzag"
    accumulation: int = 1
    clip: bool = False
    ulysses: int = 1
    checkpointing: bool = False
    hosted_checkpointing: bool = False
    """Whether DeepSpeed checkpoints the layers, and not torch."""
    zero: dict[str, Any] = field(default_factory=dict, hash=False)
    config: dict[str, Any] = field(default_factory=dict, hash=False)
    init: bool = False
    """Whether the model is built under zero.Init."""
    adam: bool = False
    mpu: bool = False
    """Whether DeepSpeed is told of the ring by an mpu, and not by the block."""

    def __str__(self) -> str:
        parts = [f"{self.family}-zero{self.stage}-ring{self.ring}-{self.layout}"]
        parts += [f"accumulate{self.accumulation}"] * (self.accumulation > 1)
        parts += (
            ["clip"] * self.clip + ["init"] * self.init + ["mpu"] * self.mpu + ["adam"] * self.adam
        )
        parts += [f"ulysses{self.ulysses}"] * (self.ulysses > 1)
        parts += ["checkpointing"] * self.checkpointing
        parts += ["hosted_checkpointing"] * self.hosted_checkpointing
        parts += [f"{key}={value}" for key, value in {**self.zero, **self.config}.items()]
        return "-".join(parts)

    @property
    def case(self) -> Case:
        return Case(self.family)

    def host_config(self, data_size: int) -> dict[str, Any]:
        """What a user of DeepSpeed writes."""
        rows = self.case.rows
        return {
            "train_batch_size": rows * self.accumulation * data_size,
            "train_micro_batch_size_per_gpu": rows,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": CLIP if self.clip else 0.0,
            "zero_optimization": {"stage": self.stage, **self.zero},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            NAME: {"size": self.ring, "layout": self.layout, "ulysses": self.ulysses},
            **self.config,
        }


@dataclass(frozen=True)
class Trained:
    """What STEPS steps did."""

    losses: list[float]
    norms: list[float]
    """Of gradients, before they are clipped."""
    gradients: Batch
    """Of the last step, before they are clipped."""
    weights: Batch


def start() -> None:
    """DeepSpeed in a rank of the pool, without the all-reduce that it would compile for CPUs."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)  # DeepSpeed's names of collectives
    for name in ("RANK", "LOCAL_RANK"):
        os.environ[name] = str(dist.get_rank())
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Its steps are as exact as the gradients, whatever their size."""
    return torch.optim.SGD(model.parameters(), LR, MOMENTUM)


def optimizer_of(run: Run, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Adam's steps are so with an epsilon that is large beside small gradients."""
    return torch.optim.AdamW(model.parameters(), LR, eps=1.0) if run.adam else sgd(model)


def number(step: int, micro: int, run: Run, data_size: int, data_rank: int) -> int:
    """Of a batch among those of the run."""
    return (step * run.accumulation + micro) * data_size + data_rank


def one_process(
    run: Run, data_size: int, steps: int = STEPS, dtype: torch.dtype = torch.float64
) -> Trained:
    """Plain torch and eager attention."""
    losses, norms, found = [], [], {}
    with exact() if dtype == torch.float64 else nullcontext():
        model: torch.nn.Module = built(run.case)
        model.to(dtype)
        optimizer = optimizer_of(run, model)
        for step in range(steps):
            optimizer.zero_grad()
            batches = [
                batch(run.case, number(step, micro, run, data_size, rank))
                for micro in range(run.accumulation)
                for rank in range(data_size)
            ]
            count = sum((each["labels"][:, 1:] != -100).sum() for each in batches)
            losses.append(0.0)
            for each in batches:
                loss = model(**each, num_items_in_batch=count, use_cache=False).loss
                loss.backward()
                losses[-1] += loss.item()
            found = {name: x.clone() for name, x in gradients(model).items()}
            norms.append(norm_of(found))
            if run.clip:
                assert norms[-1] > CLIP
                torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
    return Trained(losses, norms, found, state(model))


@dataclass(frozen=True)
class Wanted:
    """What a run should do."""

    exact: Trained
    rounding: float
    """How far float32 takes one process's gradients from the exact ones."""


@cache
def _wanted(run: Run, data_size: int) -> Wanted:
    exactly, roughly = (
        one_process(run, data_size, STEPS, x) for x in (torch.float64, torch.float32)
    )
    return Wanted(exactly, apart(roughly.gradients, exactly.gradients))


def wanted(run: Run, world_size: int = 4) -> Wanted:
    """Worked out once for all runs that must end alike."""
    alike = Run(run.family, accumulation=run.accumulation, clip=run.clip, adam=run.adam)
    return _wanted(alike, world_size // run.ring)


def state(model: torch.nn.Module) -> Batch:
    """Whole weights on every rank."""
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: x.detach().clone() for name, x in model.named_parameters()}


def model_of(run: Run) -> PreTrainedModel:
    model = built(run.case).float()
    if run.init:
        whole, config = model.state_dict(), run.host_config(dist.get_world_size() // run.ring)
        start()
        with (
            deepspeed.zero.Init(config_dict_or_path=host_config(config)),
            no_init_weights(),
        ):
            model = type(model)._from_config(model.config)
        weights = dict(model.named_parameters())
        with deepspeed.zero.GatheredParameters(list(weights.values()), modifier_rank=0):
            for name, weight in weights.items():
                weight.data.copy_(whole[name])
    if run.checkpointing:
        kept = {"use_reentrant": False, "context_fn": attention_kept}
        model.gradient_checkpointing_enable(kept)
    if run.hosted_checkpointing:
        # With checkpoint_in_cpu DeepSpeed 0.19.8 empties the inputs themselves where there is no
        # other device to copy them from.
        deepspeed.checkpointing.configure(None)
        model._set_gradient_checkpointing(True, deepspeed.checkpointing.checkpoint)
        assert model.is_gradient_checkpointing
    return model


def engine_of(run: Run) -> Any:
    start()
    manager, model = groups(ring=run.ring // run.ulysses, ulysses=run.ulysses), model_of(run)
    config = run.host_config(manager.size("data"))
    optimizer = optimizer_of(run, model)
    if not run.mpu:
        return initialize(model=model, optimizer=optimizer, config=config, manager=manager)[0]
    block = RingBlock(**config.pop(NAME))
    use_ring_attention(model)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, mpu=RingMPU(manager)
    )
    engine.ring = DeepSpeedRing.of(engine, manager, block)
    return engine


def destroy(engine: Any) -> None:
    """DeepSpeed keeps an engine's mpu for those after it."""
    engine.destroy()
    deepspeed.utils.groups.mpu = None


def step_of(engine: Any, run: Run, step: int) -> tuple[float, Batch]:
    """The loss of a step and its gradients, which are whole."""
    data_size, data_rank = (getattr(engine.ring.manager, of)("data") for of in ("size", "rank"))
    found: Batch = {}
    parts = [
        engine.ring.batch(batch(run.case, number(step, micro, run, data_size, data_rank)))
        for micro in range(run.accumulation)
    ]
    assert {part.sequence.layout for part in parts} == {run.layout}
    count = engine.ring.count(part.shift_labels for part in parts)
    total = 0.0
    for micro, part in enumerate(parts):
        loss = engine.ring.loss(engine(**part.inputs).logits, part.shift_labels, count)
        engine.backward(loss)
        total += loss.item()
        if micro == run.accumulation - 1:
            found = {
                name: safe_get_full_grad(x).clone() for name, x in engine.module.named_parameters()
            }
        engine.step()
    return total, found


def errors(run: Run, wanted: Wanted) -> list[tuple[float, str]]:
    """How far each of this rank's results is from one process's, in units of PRECISION; worst
    first.
    """
    engine = engine_of(run)
    found = compared(engine, run, wanted)
    destroy(engine)
    return found


def compared(engine: Any, run: Run, wanted: Wanted, first: int = 0) -> list[tuple[float, str]]:
    """`errors` of the steps from `first` on."""
    exactly, last = wanted.exact, Batch()
    found: list[tuple[float, str]] = []
    for step in range(first, STEPS):
        loss, last = step_of(engine, run, step)
        norm = float(engine.get_global_grad_norm() or norm_of(last))
        found.append((abs(loss / exactly.losses[step] - 1), f"loss {step}"))
        found.append((abs(norm / exactly.norms[step] - 1), f"norm {step}"))
    weights = state(engine.module)
    found += [(relative(weights[name].double(), x), name) for name, x in exactly.weights.items()]
    allowed = max(PRECISION, 4 * wanted.rounding) / PRECISION
    found.append((apart(last, exactly.gradients) / allowed, "gradients"))
    return sorted(((size / PRECISION, what) for size, what in found), reverse=True)


def norm_of(gradients: Batch) -> float:
    return torch.stack([x.double().square().sum() for x in gradients.values()]).sum().sqrt().item()


def apart(got: Batch, wanted: Batch) -> float:
    """The norm of the difference over that of what is wanted, all weights together."""
    assert got.keys() == wanted.keys()
    return norm_of({name: got[name].double() - x for name, x in wanted.items()}) / norm_of(wanted)
