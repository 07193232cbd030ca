"""The end of Megatron's CUDA graphs, before that of the communicators whose work they hold."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("megatron")
import torch
from megatron.core.full_cuda_graph import FullCudaGraphWrapper
from megatron.core.transformer import cuda_graphs

from ring_sp.integrations.megatron import drop_graphs

ROOT = Path(__file__).parents[1]
ENDING = """
import sys, torch, torch.distributed as dist
from types import SimpleNamespace
from megatron.core.full_cuda_graph import FullCudaGraphWrapper
from ring_sp.integrations.megatron import RingOptions, install

def reset():
    print("dropped, groups there:", dist.is_initialized())

made = install(RingOptions())
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
torch.cuda.synchronize = lambda: print("done")
FullCudaGraphWrapper.cuda_graph["training"] = SimpleNamespace(reset=reset)
exec(sys.argv[1])
"""
CAPTURED = """
import os, torch, torch.distributed as dist
from megatron.core.full_cuda_graph import FullCudaGraphWrapper
from ring_sp.integrations.megatron import RingOptions, install

install(RingOptions())
torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("nccl")
x = torch.ones(8, device="cuda")
dist.all_reduce(x)
graph = FullCudaGraphWrapper.cuda_graph["training"] = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    dist.all_reduce(x)
graph.replay()
assert x.tolist() == [dist.get_world_size() ** 2] * 8
"""


def _recorded() -> list[Any]:
    """One layer's graph, as Megatron's own records have it."""
    runner = cuda_graphs._CudaGraphRunner.__new__(cuda_graphs._CudaGraphRunner)
    torch.nn.Module.__init__(runner)
    runner.fwd_graph = SimpleNamespace()
    return [runner, "fwd"]


def test_graphs_go_once_their_work_is_done() -> None:
    graph, record = mock.Mock(), _recorded()
    held = {"training": graph, "validation": None}
    known = cuda_graphs._CudagraphGlobalRecord
    with (
        mock.patch.object(FullCudaGraphWrapper, "cuda_graph", held),
        mock.patch.object(known, "cudagraph_record", [record]),
        mock.patch.object(torch.cuda, "synchronize", graph.synchronize),
    ):
        drop_graphs()
    assert graph.method_calls == [mock.call.synchronize(), mock.call.reset()]
    assert record[0].fwd_graph is None, "a layer's own"


def test_without_graphs_nobody_is_waited_for() -> None:
    with mock.patch.object(torch.cuda, "synchronize", side_effect=AssertionError):
        drop_graphs()


@pytest.mark.parametrize("end", ["made.remove()", "sys.exit(3)", "raise ValueError('no data')"])
def test_graphs_go_before_the_communicators_however_a_script_ends(end: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ENDING, end],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == ["done", "dropped, groups there: True"], done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs that speak NCCL")
def test_a_process_ends_whose_graph_holds_work_of_nccl(tmp_path: Path) -> None:
    script = tmp_path / "captured.py"
    script.write_text(CAPTURED)
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert subprocess.run([*ranks, script], cwd=ROOT, check=False, timeout=120).returncode == 0
