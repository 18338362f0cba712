"""Where a numeric test runs: on a GPU, or on the CPU in Triton's interpreter.

The interpreter must be chosen before any kernel is imported, so those tests run in a process of
their own, which test_interpreted.py starts; elsewhere they are deselected.
"""

import functools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from clsa_compile.ir import references
from clsa_compile.ir.references import REFERENCES, attend_mask

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def on_cpu(reference: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a reference that runs on the CPU, whatever device its operands are on."""

    @functools.wraps(reference)
    def call(*args: Any, **kwargs: Any) -> Any:
        devices = [x.device for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        args, kwargs = tree_map_only(Tensor, Tensor.cpu, (args, kwargs))
        return tree_map_only(Tensor, lambda x: x.to(devices[0]), reference(*args, **kwargs))

    return call


# For compute-sanitizer, which cannot leave cuBLAS out and takes minutes for it. Before any test module.
if os.environ.get("CLSA_REFERENCES") == "cpu":
    for name in [n for n in vars(references) if n.endswith("_reference")]:
        setattr(references, name, on_cpu(getattr(references, name)))
    REFERENCES.update({op: on_cpu(reference) for op, reference in REFERENCES.items()})


def runs_here(item: pytest.Item) -> bool:
    """Tells whether this process is the one for a test: interpreted tests have one to themselves."""
    callspec = getattr(item, "callspec", None)
    interpreted = callspec is not None and callspec.params.get("device") == "interpreter"
    return interpreted == INTERPRETING


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    folder = os.path.dirname(__file__)
    gone = {i for i in items if str(i.path).startswith(folder) and not runs_here(i)}
    if part := os.environ.get("CLSA_INTERPRETED_PART"):
        number, parts = map(int, part.split("/"))
        gone.update([i for at, i in enumerate(i for i in items if i not in gone) if at % parts != number])
    if gone:
        config.hook.pytest_deselected(items=[i for i in items if i in gone])
        items[:] = [i for i in items if i not in gone]


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Names the device of a test's tensors; the seed is the same for every test."""
    torch.manual_seed(0)
    return "cuda" if request.param == "cuda" else "cpu"


@pytest.fixture(autouse=True, scope="session")
def kernel_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps generated kernels out of the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def run() -> Callable[..., Any]:
    """Returns `run(op, variant name, *contract arguments)`, an eager launch."""
    from clsa_compile.kernels.catalog import VARIANTS

    launches = {(v.op, v.name): v.launch for v in VARIANTS}

    def launch(op: str, name: str, *arguments: Any) -> Any:
        return launches[op, name](*arguments, wrap=lambda kernel: kernel)

    return launch


@pytest.fixture(scope="session")
def repeats() -> range:
    """Counts the launches that must give one result, on a GPU: the interpreter runs programs in order."""
    return range(100)


def widened(value: Any) -> Any:
    """Returns floating tensors in float64, inside lists too."""
    if isinstance(value, list | tuple):
        return [widened(v) for v in value]
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


@dataclass(frozen=True)
class Judge:
    """Compares attention with its reference, row by row."""

    op: str

    def valid_rows(self, arguments: tuple[Any, ...]) -> Tensor:
        """Returns the boolean [B, H, S] of rows with at least one valid key."""
        q, k = arguments[:2]
        sparse = self.op == "sparse_attention"
        mask, _, inputs, _, _, _, predicate = arguments[4:11] if sparse else arguments[3:10]
        sizes = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        valid, bias = attend_mask(mask, inputs, predicate, sizes, q.device)
        allowed = torch.ones(sizes, dtype=torch.bool, device=q.device)
        if valid is not None:
            allowed = allowed & valid
        if bias is not None:
            allowed = allowed & (bias > torch.finfo(bias.dtype).min)
        if sparse:
            from clsa_compile.ir.references import all_below, mask_bounds_reference, selected

            indices, dense_below = arguments[3], arguments[12] if len(arguments) > 12 else 0
            if dense_below:
                reach = mask_bounds_reference(q, mask, inputs, q.shape[1], k.shape[2], predicate)
                indices = all_below(indices, reach, dense_below)
            chosen = selected(indices, k.shape[2])
            repeats = 1 if chosen.shape[1] == 1 else q.shape[1] // chosen.shape[1]
            allowed = allowed & chosen.repeat_interleave(repeats, 1)
        return allowed.any(-1)

    def __call__(self, result: Any, arguments: tuple[Any, ...]) -> None:
        """Asserts that `result` errs at most three times as much as the reference in its own dtype."""
        exact = REFERENCES[self.op](*(widened(a) for a in arguments))
        rough = REFERENCES[self.op](*arguments)
        rows = self.valid_rows(arguments)
        dtype = arguments[0].dtype
        assert first(result).dtype == dtype
        assert first(result).shape == first(exact).shape
        self.near(first(result)[rows], first(exact)[rows], first(rough)[rows], dtype)
        assert (first(result)[~rows] == 0).all()
        if isinstance(result, tuple):
            self.near(result[1][rows], exact[1][rows], rough[1][rows], torch.float32)
            assert (result[1][~rows] == -math.inf).all()

    def near(self, got: Tensor, exact: Tensor, rough: Tensor, dtype: torch.dtype) -> None:
        if exact.numel() == 0:
            return
        budget = 3 * (rough.double() - exact).abs().max() + 4 * torch.finfo(dtype).eps * (exact.abs().max())
        error = (got.double() - exact).abs().max()
        assert error <= budget, f"error {error:.3g}, budget {budget:.3g}"


@pytest.fixture(scope="session")
def judge() -> Callable[[str], Judge]:
    """Returns `judge(op)(result, arguments)`."""
    return Judge
