"""Laws about the source itself. A law maps files (path -> source) to the places that break it."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("ring_sp", "integrations", "examples", "tests")
LAYERS = [
    "layout",
    "regions",
    "masks",
    "symmetric",
    "ring",
    "gather",
    "exchanges",
    "topology",
    "agreement",
    "plan",
    "sequence",
    "kernels.dropout",
    "kernels.contract",
    "kernels.merge",
    "kernels.triton_found",
    "kernels.tile_table",
    "kernels.triton_blocks",
    "kernels.triton_forward",
    "kernels.triton_hopper",
    "kernels.triton_backward",
    "kernels.triton_hopper_backward",
    "kernels.triton_merge",
    "kernels.triton_delta",
    "kernels.triton_row_max",
    "kernels.delta",
    "kernels.bands",
    "kernels.fold",
    "kernels.aten",
    "kernels.*",
    "kernels.row_max",
    "kernels",
    "ulysses",
    "fit",
    "passes",
    "kept",
    "operator",
    "lanes",
    "offload",
    "checkpointing",
    "attention",
    "logits",
    "loads",
    "explanation",
    "loss",
    "linear_loss",
    "blockwise",
    "tokenwise",
    "rotary",
    "replicated",
    "modules",
    "transformer",
    "decode",
    "hardware",
    "model_shape",
    "job",
    "step_memory",
    "step_time",
    "estimate",
    "search",
    "planner",
    "plan_picture",
    "arithmetic",
    "paper",
    "tables",
    "installed",
    "group",
    "bench",
    "doctor",
    "__init__",
    "cli",
    "__main__",
]
"""The modules of ring_sp, each below all that may import it. kernels.* is a backend without a place
of its own; one backend does not import another.
"""
TORCHLESS = {"ring_sp.layout", "ring_sp.regions", "ring_sp.masks", "ring_sp.kernels.bands"}
TORCHLESS |= {"ring_sp.hardware", "ring_sp.model_shape", "ring_sp.paper"}
HOSTS = {"megatron", "deepspeed", "transformers", "accelerate", "apex", "transformer_engine"}
MAX_LINES, MAX_TRITON_LINES, MAX_STATEMENTS = 300, 450, 40

Files = dict[str, str]
Law = Callable[[Files], Iterator[str]]


def imports_point_down(files: Files) -> Iterator[str]:
    modules = _modules(_under(files, "ring_sp"))
    for module, path in modules.items():
        layer = _layer(module)
        if layer is None:
            yield f"{path}: has no layer; place it in LAYERS, below all that may import it"
            continue
        for line, name in _imports(path, files[path]):
            target = _within(name, modules)
            above = _layer(target) if target else None
            if above is not None and above >= layer:
                yield f"{path}:{line}: imports {target}, which is not below it in LAYERS"


def core_imports_no_host(files: Files) -> Iterator[str]:
    for path, source in _under(files, "ring_sp").items():
        for line, name in _imports(path, source):
            if name.split(".")[0] in HOSTS or f"{name}.".startswith("ring_sp.integrations."):
                yield f"{path}:{line}: imports {name}; what knows a host belongs in integrations"


def geometry_imports_no_torch(files: Files) -> Iterator[str]:
    modules = _modules(files)
    reached = TORCHLESS & modules.keys()
    waiting = list(reached)
    while waiting:
        path = modules[waiting.pop()]
        for line, name in _imports(path, files[path]):
            target = _within(name, modules)
            if name.split(".")[0] == "torch":
                yield f"{path}:{line}: imports torch, and {', '.join(sorted(TORCHLESS))} need it"
            elif target and target not in reached:
                reached.add(target)
                waiting.append(target)


def modules_are_short(files: Files) -> Iterator[str]:
    for path, source in files.items():
        in_triton = path.startswith("ring_sp/kernels/") and any(
            name.split(".")[0] == "triton" for _, name in _imports(path, source)
        )
        limit = MAX_TRITON_LINES if in_triton else MAX_LINES
        if (num_lines := len(source.splitlines())) > limit:
            yield f"{path}: has {num_lines} lines, more than {limit}; split it"


def functions_are_short(files: Files) -> Iterator[str]:
    for path, node in _nodes(files):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            num_statements = sum(isinstance(inner, ast.stmt) for inner in ast.walk(node)) - 1
            if num_statements > MAX_STATEMENTS:
                yield f"{path}:{node.lineno}: {node.name} has {num_statements} statements"


def library_never_prints(files: Files) -> Iterator[str]:
    for path, node in _nodes(_under(files, "ring_sp", "integrations")):
        speaks = any(part.startswith(("cli", "__main__")) for part in Path(path).parts)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print" and not speaks:
            yield f"{path}:{node.lineno}: prints; only a cli does"


def library_reads_no_environment(files: Files) -> Iterator[str]:
    readers = {"environ", "environb", "getenv", "getenvb"}
    for path, node in _nodes(_under(files, "ring_sp", "integrations")):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "os":
            names = {node.attr}
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            names = {alias.name for alias in node.names}
        else:
            continue
        if names & readers:
            yield f"{path}:{node.lineno}: reads the environment; take an argument instead"


def names_say_what_is_inside(files: Files) -> Iterator[str]:
    for path in files:
        if {"utils", "common", "helpers"} & {*Path(path).with_suffix("").parts}:
            yield f"{path}: name it after what it does"


def public_names_have_docstrings(files: Files) -> Iterator[str]:
    for path, source in _under(files, "ring_sp").items():
        for node in ast.parse(source).body:
            if (
                isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
                and not node.name.startswith("_")
                and not ast.get_docstring(node)
                and "overload" not in map(ast.unparse, node.decorator_list)
            ):
                yield f"{path}:{node.lineno}: {node.name} has no docstring"


def _under(files: Files, *folders: str) -> Files:
    return {path: source for path, source in files.items() if path.split("/")[0] in folders}


def _nodes(files: Files) -> Iterator[tuple[str, ast.AST]]:
    for path, source in files.items():
        for node in ast.walk(ast.parse(source)):
            yield path, node


def _modules(files: Files) -> dict[str, str]:
    """Dotted name -> path."""
    return {
        path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in files
    }


def _imports(path: str, source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import; `from a import b` is a.b, be it a module or not."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.split("/")[: -node.level] if node.level else []
            base = ".".join([*package, *filter(None, [node.module])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def _within(name: str, modules: dict[str, str]) -> str | None:
    """The module that a dotted name is, or is in."""
    while name not in modules:
        name, dot, _ = name.rpartition(".")
        if not dot:
            return None
    return name


def _layer(module: str) -> int | None:
    name = module.removeprefix("ring_sp").lstrip(".") or "__init__"
    if name not in LAYERS and name.startswith("kernels."):
        name = "kernels.*"
    return LAYERS.index(name) if name in LAYERS else None


PLANTED: list[tuple[Law, Files]] = [
    (imports_point_down, {"ring_sp/ring.py": "import ring_sp.sequence", "ring_sp/sequence.py": ""}),
    (imports_point_down, {"ring_sp/ring.py": "from . import loss", "ring_sp/loss.py": ""}),
    (
        imports_point_down,
        {"ring_sp/ring.py": "from ring_sp import Mask", "ring_sp/__init__.py": ""},
    ),
    (imports_point_down, {"ring_sp/unplaced.py": ""}),
    (
        imports_point_down,
        {
            "ring_sp/kernels/one.py": "def f():\n    from ring_sp.kernels.two import g",
            "ring_sp/kernels/two.py": "",
        },
    ),
    (core_imports_no_host, {"ring_sp/ring.py": "from megatron.core import parallel_state"}),
    (core_imports_no_host, {"ring_sp/cli.py": "from ring_sp import integrations"}),
    (core_imports_no_host, {"ring_sp/cli.py": "from .integrations.megatron import spec"}),
    (geometry_imports_no_torch, {"ring_sp/masks.py": "from torch import Tensor"}),
    (
        geometry_imports_no_torch,
        {"ring_sp/masks.py": "from .ring import hop", "ring_sp/ring.py": "import torch.nn"},
    ),
    (modules_are_short, {"examples/train.py": "\n" * 301}),
    (modules_are_short, {"ring_sp/kernels/fused.py": "import triton\n" + "\n" * 450}),
    (functions_are_short, {"tests/test_ring.py": "def f():\n if a:\n" + "  b = 1\n" * 40}),
    (library_never_prints, {"integrations/megatron/spec.py": "def f():\n    print(1)"}),
    (library_reads_no_environment, {"ring_sp/ring.py": "import os\na = os.environ['A']"}),
    (library_reads_no_environment, {"integrations/deepspeed.py": "from os import getenv"}),
    (names_say_what_is_inside, {"tests/utils.py": ""}),
    (names_say_what_is_inside, {"ring_sp/common/ring.py": ""}),
    (public_names_have_docstrings, {"ring_sp/ring.py": "class Ring:\n    size: int"}),
]


@pytest.fixture(scope="module")
def sources() -> Files:
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in paths}


@pytest.mark.parametrize("law", dict.fromkeys(law for law, _ in PLANTED))
def test_the_source_keeps(law: Law, sources: Files) -> None:
    assert {path.split("/")[0] for path in sources} >= {"ring_sp", "integrations", "tests"}
    if broken := list(law(sources)):
        pytest.fail("\n".join(broken), pytrace=False)


@pytest.mark.parametrize(("law", "files"), PLANTED)
def test_a_violation_is_found_by(law: Law, files: Files) -> None:
    assert len(list(law(files))) == 1
