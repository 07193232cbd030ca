import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import World
from oracle import attention, dense_mask
from ranks import groups, raised, sequence
from torch import Tensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from visibility import cases

from ring_sp import AttentionConfig, RingAttention, RingTransformer, ShardedSequence, masks
from ring_sp.layout import LAYOUTS
from ring_sp.loss import IGNORE, shift_labels
from ring_sp.ring import Axis
from ring_sp.topology import Topology

CONFIG = AttentionConfig(12, 4, num_kv_heads=2, head_dim=6, bias=True, scale=0.5, softcap=4.0)
ONE = torch.ones(())
Sizes = dict[str, int]
Results = dict[str, Tensor]
Sequences = dict[str, ShardedSequence]
Error = tuple[float, str]


@dataclass(frozen=True)
class Case:
    """A batch, by its seed, how it is spread, and the parameters that get no gradient."""

    mask: str = "causal"
    layout: str = "zigzag"
    seq_len: int = 29
    context_len: int | None = None
    frozen: tuple[str, ...] = ()
    seed: int = 0

    @property
    def rule(self) -> masks.Mask:
        return cases(self.seq_len)[self.mask][0]

    @property
    def visible(self) -> Tensor:
        sees = cases(self.seq_len)[self.mask][1]
        return dense_mask(sees, self.seq_len, self.context_len or self.seq_len)

    def random(self, *shape: int) -> Tensor:
        make = torch.Generator().manual_seed(self.seed + sum(shape))
        return torch.randn(shape, generator=make, dtype=torch.float64)

    def text(self) -> Results:
        """Tokens and labels [2, seq_len]; most labels of the first ranks are ignored."""
        make = torch.Generator().manual_seed(self.seed)
        tokens = torch.randint(17, (2, self.seq_len), generator=make)
        labels = shift_labels(tokens)
        labels[0, : self.seq_len // 2], labels[1, 1 : self.seq_len // 4] = IGNORE, IGNORE
        return {"tokens": tokens, "labels": labels}


CASES = [
    *(Case("causal", layout, 29) for layout in LAYOUTS),
    *(Case("window", layout, 4, None, ("wk.weight", "wo.bias")) for layout in LAYOUTS),
    *(Case("documents", layout, 30, None, ("w",)) for layout in LAYOUTS),
    *(Case("full", layout, 13) for layout in LAYOUTS),
    # Without rotary, the gradient of the keys' bias is nothing but rounding.
    Case("full", "zigzag", 11, 22, ("wk.bias",)),
    Case("causal", "striped", 21, 6, ("wk.bias",)),
]
TOPOLOGIES = [{}, {"ring": 4}, {"outer": 2, "ring": 2}, {"ring": 2, "ulysses": 2}, {"ring": 2}]


def turned(x: Tensor) -> Tensor:
    """Rotary embedding of x [B, S, H, D] at positions 0 .. S - 1, by complex numbers."""
    turns = 10000.0 ** -(torch.arange(0, x.shape[3], 2).double() / x.shape[3])
    angles = torch.outer(torch.arange(x.shape[1]).double(), turns)
    pairs = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([pairs.real, pairs.imag], -1)


def plain_attention(p: Results, visible: Tensor, x: Tensor, *context: Tensor) -> Tensor:
    q, k, v = (
        (y @ p[f"{name}.weight"].T + p[f"{name}.bias"]).unflatten(-1, (-1, 6))
        for name, y in zip(("wq", "wk", "wv"), (x, *(context or (x,)) * 2), strict=True)
    )
    q, k = (q, k) if context else (turned(q), turned(k))
    return attention(q, k, v, visible, 0.5, 4)[0].flatten(2) @ p["wo.weight"].T + p["wo.bias"]


def plain_logits(p: Results, case: Case) -> Tensor:
    norm = partial(functional.rms_norm, normalized_shape=(12,), eps=1e-5)
    x = p["embedding.weight"][case.text()["tokens"]]
    for at in ("blocks.0.", "blocks.1."):
        own = {name.removeprefix(f"{at}attention."): value for name, value in p.items()}
        x = x + plain_attention(own, case.visible, norm(x, weight=p[f"{at}attention_norm.weight"]))
        normed = norm(x, weight=p[f"{at}feed_forward_norm.weight"])
        gate, up = (normed @ p[f"{at}up.weight"].T).chunk(2, -1)
        x = x + (gate * gate.sigmoid() * up) @ p[f"{at}down.weight"].T
    return norm(x, weight=p["norm.weight"]) @ p.get("head.weight", p["embedding.weight"]).T


def plain_loss(p: Results, case: Case) -> Tensor:
    return functional.cross_entropy(plain_logits(p, case).mT, case.text()["labels"])


def filled(module: torch.nn.Module, frozen: tuple[str, ...] = ()) -> Results:
    """The parameters of a module, made float64 and the same on every rank and every topology."""
    make = torch.Generator().manual_seed(7)
    for name, parameter in module.double().named_parameters():
        parameter.requires_grad_(not name.startswith(frozen)).data.normal_(std=0.4, generator=make)
    return dict(module.named_parameters())


def transformer(sizes: Sizes | None = None, **options: object) -> tuple[RingTransformer, Results]:
    topology = None if sizes is None else groups(**sizes).topology
    model = RingTransformer(17, 2, CONFIG, topology=topology, **options)  # type: ignore[arg-type]
    return model, filled(model)


def taken(out: Tensor, cotangent: Tensor, leaves: Results) -> Results:
    grads = torch.autograd.grad(out, list(leaves.values()), cotangent)
    return {"out": out, **dict(zip(leaves, grads, strict=True))}


def worst(got: Results, wanted: Results, where: object = "") -> Error:
    """The largest error, relative to the largest value of a result."""
    assert got.keys() == wanted.keys()
    return max(
        (((got[name] - x).abs().max() / x.abs().max()).item(), f"{name} {where}")
        for name, x in wanted.items()
    )


def call_errors(
    module: torch.nn.Module, case: Case, plain: Tensor, inputs: Results, seqs: Sequences
) -> list[Error]:
    """Of a whole and of a sharded call; `seqs` says where the inputs and the output live."""
    p = {name: x for name, x in module.named_parameters() if x.requires_grad}
    trained = {name: x for name, x in inputs.items() if x.requires_grad}
    cotangent = case.random(*plain.shape, 1)[..., 0]
    wanted = taken(plain, cotangent, {**trained, **p})
    whole = taken(module(*inputs.values()), cotangent, {**trained, **p})

    parts = {name: seqs[name].shard(x.detach()) for name, x in inputs.items()}
    keys = {"context_sequence": seqs["context"]} if "context" in inputs else {}
    trained = {name: parts[name].requires_grad_() for name in trained}
    out = module(*parts.values(), sequence=seqs["out"], **keys)
    got = taken(out, seqs["out"].shard(cotangent) if out.dim() else cotangent, {**trained, **p})
    for name in ("out", *trained) if out.dim() else ():
        got[name] = seqs[name].unshard(got[name])
    return [worst(whole, wanted, f"whole {case}"), worst(got, wanted, f"sharded {case}")]


def errors(sizes: Sizes, checked: list[Case]) -> Error:
    """Of attention, and of logits and losses; each ring has its own batch."""
    found, manager = [], groups(**sizes)
    for case in (replace(case, seed=manager.rank("data")) for case in checked):
        seq = sequence(sizes, case.seq_len, mask=case.rule, layout=case.layout)
        seqs = {"x": seq}
        if case.context_len:
            seqs["context"] = sequence(sizes, case.context_len, layout=case.layout)
        inputs = {n: case.random(2, s.seq_len, 12).requires_grad_() for n, s in seqs.items()}
        module = RingAttention(CONFIG, manager.topology, case.rule, case.layout)
        plain = plain_attention(filled(module, case.frozen), case.visible, *inputs.values())
        found += call_errors(module, case, plain, inputs, {"out": seq, **seqs})
        if not case.context_len:
            tied = case.mask == "causal"
            model, p = transformer(sizes, mask=case.rule, layout=case.layout, tied=tied)
            text, seqs = case.text(), dict.fromkeys(("out", *case.text()), seq)
            found += call_errors(model, case, plain_loss(p, case), text, seqs)
            del text["labels"]
            found += call_errors(model, case, plain_logits(p, case), text, seqs)
    return max(found)


@pytest.mark.parametrize("sizes", TOPOLOGIES, ids=str)
def test_modules_equal_the_formula(world: Callable[[int], World], sizes: Sizes) -> None:
    found = world(4 if sizes else 1).run(errors, sizes, CASES[:: max(len(sizes), 1)])
    assert max(found)[0] < 1e-12, max(found)


def accumulated_errors(sizes: Sizes) -> Error:
    """Of two micro-batches under DDP, one with documents, against the mean over data ranks."""
    manager, (model, p) = groups(**sizes), transformer(sizes)
    batches = [[Case("documents", seed=n), Case(seed=n)] for n in range(manager.size("data"))]
    losses = [plain_loss(p, case) for micro in batches for case in micro]
    wanted = taken(torch.stack(losses).sum() / len(batches), ONE, p)
    first, second = batches[manager.rank("data")]
    parallel = DistributedDataParallel(model)
    with parallel.no_sync():
        parallel(**first.text(), mask=first.rule).backward()
    parallel(**second.text(), mask=second.rule).backward()
    got = {name: x.grad for name, x in p.items() if x.grad is not None}
    return worst({**wanted, **got}, wanted)


def test_gradients_accumulate_under_ddp(world: Callable[[int], World]) -> None:
    found = world(4).run(accumulated_errors, {"ring": 4})
    found += world(4).run(accumulated_errors, {"ring": 2})
    assert max(found)[0] < 1e-12, max(found)


def checkpointed_differences() -> list[float]:
    """Of gradients with the whole model checkpointed, and with each of its blocks."""
    model, p = transformer({"ring": 2, "ulysses": 2})
    plain = taken(model(**Case().text()), ONE, p)
    whole = taken(checkpoint(partial(model, **Case().text()), use_reentrant=False), ONE, p)
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    blocks = taken(model(**Case().text()), ONE, p)
    return [worst(whole, plain)[0], worst(blocks, plain)[0]]


def test_checkpointing_gives_the_same_gradients(world: Callable[[int], World]) -> None:
    assert world(4).run(checkpointed_differences) == [[0.0, 0.0]] * 4


def messages(sizes: Sizes) -> tuple[int, list[tuple[int, torch.dtype]], int]:
    """Agreements and sums of three forwards and a backward in bfloat16; trained elements."""
    model, p = transformer(sizes)
    p["blocks.0.attention.wq.weight"].requires_grad_(False)
    agree = mock.patch.object(dist, "all_gather_object", wraps=dist.all_gather_object)
    reduce = mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce)
    with agree as agreements, reduce as reduced:
        torch.stack([model.bfloat16()(**Case().text()) for _ in range(3)]).sum().backward()
    sums = [(call.args[0].numel(), call.args[0].dtype) for call in reduced.call_args_list]
    trained = sum(x.numel() for x in p.values() if x.grad is not None)
    return agreements.call_count, sums, trained


def test_a_backward_sums_all_gradients_in_one_message(world: Callable[[int], World]) -> None:
    trained = sum(x.numel() for x in transformer()[1].values()) - 24 * 12
    sums = [(2, torch.float64)] * 3 + [(trained, torch.float32)] * 3
    assert world(4).run(messages, {"ring": 4}) == [(1, sums, trained)] * 4
    assert world(4).run(messages, {}) == [(0, [], trained)] * 4


def loaded_losses(state: dict[str, Tensor]) -> list[float]:
    """Of a model with a loaded state, of a copy that outlives it, and of the copy in bfloat16."""
    model, p = transformer({"ring": 4})
    model.load_state_dict(state)
    twin, batch = copy.deepcopy(model), Case().text()
    losses = [model(**batch)]
    p["embedding.weight"].data.zero_()
    losses += [twin(**batch), twin.bfloat16()(**batch)]
    return [loss.item() for loss in losses]


def test_one_state_dict_serves_every_topology(world: Callable[[int], World]) -> None:
    model, _ = transformer()
    model.load_state_dict({name: 0.9 * x for name, x in model.state_dict().items()})
    loss = model(**Case().text()).item()
    exact, near = pytest.approx(loss, rel=1e-12), pytest.approx(loss, rel=0.05)
    assert world(4).run(loaded_losses, model.state_dict()) == [[exact, exact, near]] * 4


def test_a_module_remembers_few_sequences() -> None:
    sequences, x = transformer(layout="striped")[0].sequences, torch.zeros(2, 29)
    found = [sequences.part(x, None, masks.documents([0, cut]))[1] for cut in range(20)]
    again = sequences.part(x, None, masks.documents([0, 15]))[1]
    assert len(sequences._kept) < 10 and again is found[15] and again.layout == "striped"


def test_bad_input_is_refused_without_a_word_to_other_ranks() -> None:
    four, peers = Topology(ring=Axis(0, 4)), Topology(ulysses=Axis(0, 2))
    attend, model = RingAttention(CONFIG, four), RingTransformer(9, 1, CONFIG, topology=four)
    whole, part, tokens = torch.zeros(2, 16, 12), torch.zeros(2, 4, 12), torch.zeros(2, 16).long()
    seq, other = ShardedSequence(16, four), ShardedSequence(8, peers)
    for message, answer in {
        r"x must be .*12.*13": raised(attend, torch.zeros(2, 16, 13)),
        r"context must be .*batch size.*1, 16": raised(attend, whole, whole[:1]),
        r"both be whole or both": raised(attend, part, whole, sequence=seq),
        r"at least that many tokens; got 3": raised(model, tokens[:, :3]),
        r"pass 4 tokens.*16": raised(attend, whole, sequence=seq),
        r"not full\(\) too": raised(attend, part, sequence=seq, mask=masks.full()),
        r"labels must be .*2, 15": raised(model, tokens, tokens[:, 1:]),
        r"same topology.*2 ranks": raised(model, tokens[:, :4], sequence=other),
        r"num_kv_heads must divide": raised(AttentionConfig, 12, 4, 3),
        r"num_heads must divide dim": raised(AttentionConfig, 10, 4),
        r"even head_dim": raised(AttentionConfig, 12, 4),
        r"kernel.*'fast'": raised(RingAttention(replace(CONFIG, kernel="fast")), whole),
        r"2 divides; got 3": raised(RingAttention, AttentionConfig(6, 3), peers),
        r"topology must be a Topology.*int": raised(RingAttention, CONFIG, 7),
        r"mask must be a mask.*'causal'": raised(RingAttention, CONFIG, None, "causal"),
        r"layout must be one of.*'spiral'": raised(RingAttention, CONFIG, layout="spiral"),
        r"must be a ShardedSequence.*int": raised(model, tokens, sequence=6),
    }.items():
        assert re.search(message, answer), (message, answer)
