"""Megatron's CUDA graphs: which of them a ring may be in, and their end."""

import torch
from megatron.core.full_cuda_graph import FullCudaGraphWrapper
from megatron.core.transformer.cuda_graphs import delete_cuda_graphs
from megatron.core.transformer.transformer_config import TransformerConfig

PROVEN = "full_iteration", "local"
"""Forms of Megatron's CUDA graphs in which runs on GPUs gave a ring's losses, bit for bit
(examples/megatron/RESULTS.md): one graph of a whole iteration, and one of each layer's attention.
"transformer_engine" is by itself, and was never there.
"""


def form_of(config: TransformerConfig) -> str:
    """How Megatron would record work as CUDA graphs; Megatron-core 0.16 calls a whole iteration a
    scope.
    """
    impl: str = getattr(config, "cuda_graph_impl", None) or "none"
    return "full_iteration" if impl == "local" and "full_iteration" in modules(config) else impl


def modules(config: TransformerConfig) -> set[str]:
    """The parts of a layer that have a graph of their own; none where all of it is one."""
    named = (getattr(config, name, None) for name in ("cuda_graph_modules", "cuda_graph_scope"))
    return {getattr(part, "name", part) for parts in named for part in parts or ()}


def unsupported(config: TransformerConfig) -> dict[str, bool]:
    """What of CUDA graphs is refused, and whether a config asks for it: a replay runs no Python."""
    form = form_of(config)
    return {
        f"CUDA graphs of the form {form}; use cuda_graph_impl 'none'": (
            form not in ("none", *PROVEN)
        ),
        "CUDA graphs of whole layers, which were not tried; give cuda_graph_modules attn (in "
        "Megatron-core 0.16 cuda_graph_scope)": form == "local" and not modules(config),
        "attention dropout in a CUDA graph, which would drop the same weights in every step": (
            form != "none" and config.attention_dropout > 0
        ),
        "qk_clip or log_max_attention_logit in a CUDA graph, which would keep its first scores": (
            form != "none" and (config.qk_clip or config.log_max_attention_logit)
        ),
    }


def refuse_packed(query: torch.Tensor, packed: object) -> None:
    """Raise NotImplementedError where packed sequences, if any, come to a graph that is recorded:
    its replays would see the first ones' documents.
    """
    if packed is not None and query.is_cuda and torch.cuda.is_current_stream_capturing():
        raise NotImplementedError(
            "packed sequences in a CUDA graph, which would keep the first ones' documents; use "
            "cuda_graph_impl 'none'"
        )


def drop_graphs() -> None:
    """Let go of the graphs that Megatron has recorded in this process, once their work is done.

    NCCL from 2.26 on lets a communicator go only after every graph that holds work of it, and waits
    for that without end (commDestroySync of its src/init.cc); Megatron keeps its graphs as long as
    the process. So this comes before `destroy_process_group`, if a script calls that, and before
    the process ends, where `install` sees to it. A graph replayed after it raises RuntimeError.
    """
    graphs = [graph for graph in FullCudaGraphWrapper.cuda_graph.values() if graph is not None]
    if graphs:
        torch.cuda.synchronize()
    for graph in graphs:
        graph.reset()
    delete_cuda_graphs()
