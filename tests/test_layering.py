"""The import table of DESIGN.md, read from the sources and enforced."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STDLIB = frozenset(sys.stdlib_module_names)
# The only places that know torch's private modules: one place to mend for each torch release.
PRIVATE_TORCH = ("torch._inductor", "torch._dynamo")
COUNTERS = "torch._dynamo.utils.counters"
PUBLIC = "public"
DRIVER = "driver"


@dataclass(frozen=True)
class Rule:
    """What one part may import: parts of clsa_compile, and packages from elsewhere."""

    parts: frozenset[str]
    packages: frozenset[str]


def rule(parts: str, packages: str) -> Rule:
    """Builds a `Rule` from two blank-separated lists."""
    return Rule(frozenset(parts.split()), frozenset(packages.split()))


TABLE = {
    "errors": rule("", ""),
    "config": rule("errors ir", ""),
    "ir": rule("errors ir", "torch sympy safetensors"),
    "policies": rule("errors ir policies", ""),
    "passes": rule("errors config ir passes", "torch sympy"),
    "kernels": rule("errors ir kernels", "torch sympy jinja2 triton"),
    "kernel script": rule(
        "errors ir kernels", "torch sympy triton rich timing kernel_times kernel_cases roofline"
    ),
    DRIVER: rule(
        "errors config ir policies passes kernels driver public",
        "torch sympy jinja2 rich transformers triton safetensors matplotlib",
    ),
}
SCRIPTS = ("examples", "benchmarks")
# What times kernels must call them; everything else beside the package uses public names.
KERNEL_SCRIPTS = (
    "benchmarks/kernel_times.py",
    "benchmarks/kernels.py",
    "benchmarks/fit_cost.py",
    "benchmarks/first_use.py",
)


@dataclass(frozen=True)
class Import:
    """One imported name: dotted, with where it stands."""

    name: str
    line: int
    inside_function: bool
    relative: bool = False


def part_of(path: str) -> str:
    """Names the part that a source file, given relative to the root, belongs to."""
    if path in KERNEL_SCRIPTS:
        return "kernel script"
    pieces = Path(path).with_suffix("").parts
    if pieces[0] == "clsa_compile":
        pieces = pieces[1:]
    first = pieces[0]
    return first if first in TABLE or first in SCRIPTS else DRIVER


def part_of_module(name: str) -> str:
    """Names the part that a dotted module name of clsa_compile belongs to."""
    pieces = name.split(".")
    if len(pieces) == 1:
        return PUBLIC
    return pieces[1] if pieces[1] in TABLE else DRIVER


def read_imports(tree: ast.AST) -> Iterator[Import]:
    """Yields every import of a module, `import_module("...")` of a constant name included."""
    stack: list[tuple[ast.AST, bool]] = [(tree, False)]
    while stack:
        node, inside = stack.pop()
        yield from imports_of_node(node, inside)
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        stack.extend((child, inside) for child in ast.iter_child_nodes(node))


def imports_of_node(node: ast.AST, inside: bool) -> Iterator[Import]:
    """Yields what this one node imports."""
    match node:
        case ast.Import(names=names):
            for alias in names:
                yield Import(alias.name, node.lineno, inside)
        case ast.ImportFrom(level=level) if level:
            yield Import(node.module or "", node.lineno, inside, relative=True)
        case ast.ImportFrom(module=str(module), names=names):
            for alias in names:
                yield Import(f"{module}.{alias.name}", node.lineno, inside)
        case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]) if ast.unparse(func).endswith(
            ("import_module", "__import__")
        ):
            yield Import(name, node.lineno, inside)


def dotted_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yields every attribute chain such as `torch._dynamo.reset`, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node), node.lineno


def is_under(name: str, prefix: str) -> bool:
    """Tells whether a dotted name is `prefix` or lies in it."""
    return name == prefix or name.startswith(prefix + ".")


def may_use_private_torch(path: str) -> bool:
    """Tells whether the file is one of those that may know torch's private modules."""
    known = ("clsa_compile/backend.py", "clsa_compile/saved.py", "clsa_compile/aot.py")
    return path in known or path.startswith("clsa_compile/capture/")


def violations(path: str, source: str, public: frozenset[str] = frozenset()) -> list[str]:
    """Lists what a source breaks of the table, one line each; `public` is clsa_compile's face."""
    tree = ast.parse(source, filename=path)
    found = [
        f"{path}:{item.line}: {problem}"
        for item in read_imports(tree)
        for problem in import_problems(path, item, public)
    ]
    uses = [*((item.name, item.line) for item in read_imports(tree)), *dotted_names(tree)]
    found += [f"{path}:{line}: {text}" for name, line in uses for text in torch_problems(path, name)]
    found += [f"{path}:{line}: {text}" for line, text in variable_problems(path, tree)]
    if Path(path).name == "utils.py":
        found.append(f"{path}: say what it holds; no file is called utils.py")
    return sorted(set(found))


def import_problems(path: str, item: Import, public: frozenset[str]) -> Iterator[str]:
    """Yields what is wrong with one import."""
    if item.relative:
        yield "relative import; name the module in full"
        return
    package = item.name.split(".")[0]
    if package in ("passes", "kernels"):
        yield f"{item.name}: import it as clsa_compile.{item.name}"
        return
    part = part_of(path)
    if part in SCRIPTS:
        yield from script_problems(part, item, public)
    elif package == "clsa_compile":
        yield from internal_problems(part, item)
    elif package == "torch_mlir":
        if not path.startswith("clsa_compile/mlir/"):
            yield "torch_mlir belongs to clsa_compile/mlir/ alone"
        elif not item.inside_function:
            yield "torch_mlir is imported where it is needed: not everybody has it"
    elif package not in STDLIB and package not in TABLE[part].packages:
        yield f"{part} may not import {package}"


def internal_problems(part: str, item: Import) -> Iterator[str]:
    """Yields what is wrong with an import of one part of clsa_compile by another."""
    target = part_of_module(item.name)
    if target not in TABLE[part].parts:
        yield f"{part} may not import {item.name} ({target})"
    elif part == DRIVER and target == "kernels" and not item.inside_function:
        yield "a driver imports kernels inside the lowering call only, not at module level"


def script_problems(part: str, item: Import, public: frozenset[str]) -> Iterator[str]:
    """Yields what is wrong with an import of clsa_compile by an example or a benchmark."""
    pieces = item.name.split(".")
    if pieces[0] != "clsa_compile" or len(pieces) == 1:
        return
    if len(pieces) > 2 or pieces[1] not in public:
        yield f"{part} use public names only, and {item.name} is none"


def torch_problems(path: str, name: str) -> Iterator[str]:
    """Yields what is wrong with a use of a private torch module."""
    private = next((prefix for prefix in PRIVATE_TORCH if is_under(name, prefix)), None)
    if private and not may_use_private_torch(path):
        yield f"{private} is private: backend.py, saved.py, capture/ and aot.py may use it"
    elif is_under(name, COUNTERS) and path != "clsa_compile/backend.py":
        yield f"{COUNTERS} is for backend.py alone"


def variable_problems(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields reads of CLSA_* environment variables outside config.py (testing.py has one)."""
    if path in ("clsa_compile/config.py", "clsa_compile/testing.py") or part_of(path) in SCRIPTS:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call | ast.Subscript | ast.Compare):
            text = ast.unparse(node)
            if "CLSA_" in text and ("environ" in text or "getenv" in text):
                yield node.lineno, "config.py is the only reader of CLSA_* variables"


def sources() -> list[Path]:
    """Lists the repository's sources; links are not followed, so each file comes once."""
    folders = ("clsa_compile", "passes", "kernels", *SCRIPTS)
    inside_links = (ROOT / "clsa_compile/passes", ROOT / "clsa_compile/kernels")
    return sorted(
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if not any(link in path.parents for link in inside_links)
    )


def public_names() -> frozenset[str]:
    """Reads `__all__` of clsa_compile without importing it."""
    tree = ast.parse((ROOT / "clsa_compile/__init__.py").read_text())
    for node in tree.body:
        match node:
            case (
                ast.Assign(targets=[ast.Name(id="__all__")], value=value)
                | ast.AnnAssign(target=ast.Name(id="__all__"), value=ast.expr() as value)
            ):
                return frozenset(ast.literal_eval(value))
    raise AssertionError("clsa_compile/__init__.py has no __all__ that is a plain list")


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_import_table_holds(path: Path) -> None:
    relative = path.relative_to(ROOT).as_posix()
    public = public_names() if part_of(relative) in SCRIPTS else frozenset()
    assert violations(relative, path.read_text(), public) == []


def test_every_part_of_the_table_has_sources() -> None:
    """Guards the test above: a renamed folder must not leave it with nothing to check."""
    found = {part_of(path.relative_to(ROOT).as_posix()) for path in sources()}
    assert found == {*TABLE, *SCRIPTS}


def test_tests_import_absolutely_and_share_no_helpers() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        for item in read_imports(ast.parse(path.read_text())):
            assert not item.relative, f"{path}:{item.line}"
            assert item.name.split(".")[0] not in ("tests", "conftest"), f"{path}:{item.line}"


# --- the checker itself: each made-up source must be refused, or let through ---

REFUSED = [
    ("clsa_compile/errors.py", "import torch", "errors may not import torch"),
    ("clsa_compile/ir/plan.py", "import networkx", "ir may not import networkx"),
    ("clsa_compile/ir/ops.py", "from clsa_compile.config import Options", "ir may not"),
    ("clsa_compile/ir/ops.py", "from clsa_compile import config", "ir may not"),
    ("clsa_compile/ir/ops.py", "import clsa_compile", "ir may not"),
    ("clsa_compile/policies/every.py", "import torch", "policies may not import torch"),
    ("passes/match.py", "import clsa_compile.kernels.catalog", "passes may not"),
    ("passes/match.py", "def f():\n    from clsa_compile import kernels", "passes may not"),
    ("passes/match.py", "from clsa_compile.policies.every import every", "passes may not"),
    ("passes/match.py", "from clsa_compile.backend import clsa", "passes may not"),
    ("passes/match.py", "import triton", "passes may not import triton"),
    ("passes/match.py", "import importlib\nimportlib.import_module('triton')", "may not"),
    ("passes/match.py", "import passes.verify", "import it as clsa_compile.passes.verify"),
    ("passes/patterns/sdpa.py", "from . import pattern", "relative import"),
    ("passes/match.py", "from torch._inductor import config", "torch._inductor is private"),
    ("passes/match.py", "import torch\ntorch._dynamo.reset()", "torch._dynamo is private"),
    ("passes/utils.py", "", "utils.py"),
    ("kernels/render.py", "import clsa_compile.passes.match", "kernels may not"),
    ("kernels/render.py", "from clsa_compile.config import Options", "kernels may not"),
    ("kernels/render.py", "import os\nos.environ.get('CLSA_DUMP')", "only reader"),
    ("kernels/render.py", "import os\nos.environ['CLSA_DUMP']", "only reader"),
    ("clsa_compile/inspection.py", "import torch._dynamo", "torch._dynamo is private"),
    ("clsa_compile/backend.py", "from clsa_compile.kernels import catalog", "inside the lowering"),
    ("clsa_compile/backend.py", "import torch_mlir", "mlir/ alone"),
    ("clsa_compile/mlir/lowering.py", "import torch_mlir.ir", "where it is needed"),
    ("clsa_compile/backend.py", "import numpy", "driver may not import numpy"),
    ("clsa_compile/capture/dynamo.py", "from torch._dynamo.utils import counters", "alone"),
    ("examples/a.py", "from clsa_compile.ir.plan import Plan", "public names only"),
    ("examples/a.py", "from clsa_compile import secret", "public names only"),
    ("benchmarks/a.py", "import clsa_compile.backend", "public names only"),
    ("benchmarks/a.py", "import torch\ntorch._dynamo.reset()", "torch._dynamo is private"),
]
ALLOWED = [
    ("clsa_compile/errors.py", "import dataclasses"),
    ("clsa_compile/ir/ops.py", "import torch\nimport sympy\nfrom clsa_compile import errors"),
    ("clsa_compile/policies/every.py", "import math\nfrom clsa_compile.ir.plan import Plan"),
    ("passes/match.py", "import torch.fx\nfrom clsa_compile.config import Options"),
    ("passes/match.py", "from clsa_compile.passes import verify"),
    ("kernels/render.py", "import triton.language as tl\nimport jinja2"),
    ("clsa_compile/backend.py", "from torch._inductor.compile_fx import compile_fx"),
    ("clsa_compile/backend.py", "from torch._dynamo.utils import counters"),
    ("clsa_compile/backend.py", "def lower():\n    from clsa_compile.kernels import catalog"),
    ("clsa_compile/capture/dynamo.py", "import torch._dynamo"),
    ("clsa_compile/inspection.py", "from clsa_compile.capture.dynamo import capture"),
    ("clsa_compile/mlir/lowering.py", "def run():\n    from torch_mlir import ir"),
    ("clsa_compile/config.py", "import os\nos.environ.get('CLSA_DUMP')"),
    ("examples/a.py", "import clsa_compile\nfrom clsa_compile import Plan"),
]


@pytest.mark.parametrize(("path", "source", "problem"), REFUSED)
def test_the_checker_refuses(path: str, source: str, problem: str) -> None:
    assert any(problem in line for line in violations(path, source, frozenset({"Plan"})))


@pytest.mark.parametrize(("path", "source"), ALLOWED)
def test_the_checker_lets_through(path: str, source: str) -> None:
    assert violations(path, source, frozenset({"Plan"})) == []
