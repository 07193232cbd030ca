"""Megatron's CUDA graphs: which of them a ring may be in, and their end."""

import torch
from megatron.core.full_cuda_graph import FullCudaGraphWrapper
from megatron.core.transformer.cuda_graphs import delete_cuda_graphs
from megatron.core.transformer.transformer_config import TransformerConfig

PROVEN: tuple[str, ...] = ()
"""Forms of Megatron's CUDA graphs in which a run on GPUs has given a ring's losses.

"full_iteration" should: it is one capture by torch.cuda.graph after some steps without, in which a
ring makes its tables; it waits for no device. "local" and "transformer_engine" capture each layer
by itself, in an order of Megatron's, which no test here follows.
"""


def form_of(config: TransformerConfig) -> str:
    """How Megatron would record work as CUDA graphs; Megatron-core 0.16 calls a whole iteration a
    scope.
    """
    impl: str = getattr(config, "cuda_graph_impl", None) or "none"
    scopes = getattr(config, "cuda_graph_scope", None) or []
    whole = any(getattr(scope, "name", scope) == "full_iteration" for scope in scopes)
    return "full_iteration" if impl == "local" and whole else impl


def unsupported(config: TransformerConfig) -> dict[str, bool]:
    """What of CUDA graphs is refused, and whether a config asks for it: a replay runs no Python."""
    form = form_of(config)
    return {
        f"CUDA graphs of the form {form}; use cuda_graph_impl 'none'": (
            form not in ("none", *PROVEN)
        ),
        "attention dropout in a CUDA graph, which would drop the same weights in every step": (
            form != "none" and config.attention_dropout > 0
        ),
        "qk_clip or log_max_attention_logit in a CUDA graph, which would keep its first scores": (
            form != "none" and (config.qk_clip or config.log_max_attention_logit)
        ),
    }


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
