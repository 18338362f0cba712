"""kernels/catalog.py, and what every variant in it must be: traceable, choosable, hashable."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from clsa_compile.ir.references import REFERENCES
from clsa_compile.ir.scores import LIGHTNING
from clsa_compile.ir.variants import Facts, Variant, select
from clsa_compile.kernels import catalog
from clsa_compile.kernels.catalog import VARIANTS

B, H, HKV, D, TOPK = 3, 8, 2, 64, 32
PAGE, POOL = 20, 777


def facts(op: str, **changes: Any) -> Facts:
    known: dict[str, Any] = {
        "op": op, "device": "cuda", "dtype": torch.bfloat16, "B": 1, "H": 8, "Hkv": 2, "S": 1, "T": 4096,
        "D": 128, "Dv": 128, "topk": 256, "softcap": False, "sinks": False, "additive": False,
        "lse_used": False,
    }  # fmt: skip
    return Facts(**(known | changes))


def test_every_op_has_a_variant_for_decode_and_for_prompts() -> None:
    for op in ("attention", "sparse_attention", "index_topk"):
        for s in (1, 8, 9, 4096):
            for paged in (False, True):
                variant, reasons = select(VARIANTS, facts(op, S=s, paged=paged))
                assert variant is not None, reasons


def test_names_are_unique_and_ops_exist() -> None:
    names = [(v.op, v.name) for v in VARIANTS]
    assert len(set(names)) == len(names)
    assert {op for op, _ in names} <= set(REFERENCES)


def test_the_hash_follows_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    first = catalog.sources_hash()
    assert re.fullmatch(r"[0-9a-f]{64}", first)
    original = catalog._sources

    def edited(folder: Any, path: str) -> Iterator[tuple[str, bytes]]:
        for name, text in original(folder, path):
            yield name, text + b" " if name.endswith("combine.py.jinja") else text

    names = [name for name, _ in original(catalog.importlib.resources.files("clsa_compile.kernels"), "")]
    assert "/templates/combine.py.jinja" in names
    assert "/index_topk/select.py" in names
    monkeypatch.setattr(catalog, "_sources", edited)
    catalog.sources_hash.cache_clear()
    assert catalog.sources_hash() != first
    monkeypatch.undo()
    catalog.sources_hash.cache_clear()
    assert catalog.sources_hash() == first


def tensors(
    op: str, s: int, t: int, dynamic: bool, paged: bool, dynamic_rows: bool = False
) -> list[torch.Tensor]:
    """Returns fake CPU tensors for `op`, a block table last where `paged`.

    With `dynamic`, the keys T and the batch B, and of a pool the number of pages, are symbols; with
    `dynamic_rows` the rows S are one.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def fake(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        real = torch.empty(sizes, dtype=dtype)
        symbols = ((t, t // PAGE, B, POOL) if dynamic else ()) + ((s,) if dynamic_rows else ())
        kinds = [DimDynamic.DYNAMIC if size in symbols else DimDynamic.STATIC for size in sizes]
        context = StatelessSymbolicContext(dynamic_sizes=kinds)
        return mode.from_tensor(real, symbolic_context=context)

    cache = (POOL, HKV, PAGE, D) if paged else (B, HKV, t, D)
    common = [
        fake(B, H, s, D),
        fake(*cache),
        fake(*cache),
        fake(B, 1, s, t, dtype=torch.bool),
        fake(B, s, 2, dtype=torch.int32),
        fake(s, dtype=torch.int64),
    ]
    if op == "sparse_attention":
        common.append(fake(B, 1, s, TOPK, dtype=torch.int32))
    if op == "index_topk":
        common.append(fake(B, H, s))
    if paged:
        common.append(fake(B, t // PAGE, dtype=torch.int32))
    return common


def call(variant: Variant) -> Callable[..., Any]:
    """Returns a function of `tensors` that runs the variant as it is traced."""
    scale, predicate = D**-0.5, "kv <= in0(q)"

    def attention(q: Any, k: Any, v: Any, mask: Any, bounds: Any, position: Any, *pages: Any) -> Any:
        return variant.launch(
            q, k, v, mask, bounds, [position], None, scale, 0.0, predicate, *pages,
            wrap=torch.library.wrap_triton,
        )  # fmt: skip

    def sparse(
        q: Any, k: Any, v: Any, mask: Any, bounds: Any, position: Any, indices: Any, *pages: Any
    ) -> Any:
        return variant.launch(
            q, k, v, indices, mask, bounds, [position], None, scale, 0.0, predicate, *pages,
            wrap=torch.library.wrap_triton,
        )  # fmt: skip

    def index(q: Any, k: Any, v: Any, mask: Any, bounds: Any, position: Any, weight: Any, *pages: Any) -> Any:
        return variant.launch(
            q, k, weight, None, mask, bounds, [position], TOPK, scale, LIGHTNING.text, predicate, False,
            *pages, wrap=torch.library.wrap_triton,
        )  # fmt: skip

    def mass(q: Any, k: Any, v: Any, mask: Any, bounds: Any, position: Any) -> Any:
        weight = q.new_empty((2, H), dtype=torch.float32)
        return variant.launch(
            q, k, v, weight, mask, bounds, [position], None, scale, 0.0, predicate, 0.5,
            wrap=torch.library.wrap_triton,
        )  # fmt: skip

    def chosen(q: Any, k: Any, v: Any, mask: Any, bounds: Any, position: Any) -> Any:
        looked_at = q.new_empty((q.shape[0], 1, q.shape[2], k.shape[2]), dtype=torch.float32)
        return variant.launch(looked_at, bounds, TOPK, 4, 8, wrap=torch.library.wrap_triton)

    calls = {
        "attention": attention, "sparse_attention": sparse, "index_topk": index,
        "attention_mass": mass, "select_topk": chosen,
    }  # fmt: skip
    return calls[variant.op]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("variant", "paged"),
    [(v, paged) for v in VARIANTS for paged in (False, True) if v.supports(facts(v.op, paged=paged)).ok],
    ids=lambda v: f"{v.op}-{v.name}" if isinstance(v, Variant) else ("paged" if v else "plain"),
)
def test_every_launch_can_be_traced(variant: Variant, dynamic: bool, paged: bool) -> None:
    s = 2 if variant.name in ("decode", "radix") else 40
    inputs = tensors(variant.op, s, 5000, dynamic, paged)
    with inputs[0].fake_mode:
        graph = make_fx(call(variant), tracing_mode="real")(*inputs).graph
    kernels = [n for n in graph.nodes if "triton_kernel_wrapper" in str(n.target)]
    assert bool(kernels) == (variant.name != "sdpa")
    # The caches go to the kernels as they are.
    keys, values = [n for n in graph.nodes if n.op == "placeholder"][1:3]
    if variant.name != "sdpa":
        # A selection reads keys only, or nothing but what was made of them.
        readers = {*keys.users, *(values.users if "attention" in variant.op else ())}
        sizes = {n for n in readers if "sym_" in str(n.target)}
        assert readers - sizes <= set(kernels), readers
    if dynamic:
        shape_env = inputs[0].fake_mode.shape_env
        frees = [d for d in inputs[1].shape if isinstance(d, torch.SymInt)]
        assert frees, "T was specialised"
        # Torch's own attention asks whether sizes agree; nothing of ours may ask anything.
        if variant.name != "sdpa":
            assert not shape_env.guards, [str(g.expr) for g in shape_env.guards]


UNKNOWN = [v for v in VARIANTS if v.name != "sdpa" and v.supports(facts(v.op, S=None)).ok]


@pytest.mark.parametrize("variant", UNKNOWN, ids=lambda v: f"{v.op}-{v.name}")
def test_launches_of_an_unknown_number_of_rows_ask_nothing(variant: Variant) -> None:
    inputs = tensors(variant.op, 40, 5000, True, False, dynamic_rows=True)
    with inputs[0].fake_mode:
        graph = make_fx(call(variant), tracing_mode="real")(*inputs).graph
    assert any("triton_kernel_wrapper" in str(n.target) for n in graph.nodes)
    assert not inputs[0].fake_mode.shape_env.guards


def test_what_would_score_all_rows_of_a_prompt_at_once_waits() -> None:
    waiting = {v.op for v in VARIANTS if v.waits(facts(v.op, S=None))}
    assert waiting == {"index_topk", "select_topk"}
    assert {v.op for v in UNKNOWN} == set(REFERENCES) - {"mask_bounds"}
    assert not any(v.waits(facts(v.op, S=s)) for v in VARIANTS for s in (1, 4096))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("op", ["attention_mass", "index_topk"])
def test_launches_over_a_pool_can_be_traced(op: str, dynamic: bool) -> None:
    """The cache is copied for them, and no length is compared."""
    variant, _ = select(VARIANTS, facts(op, pooled=True))
    assert variant is not None
    assert variant.name == "pooled"
    inputs = tensors("sparse_attention", 2, 5000, dynamic, False)

    def run(q: Any, k: Any, v: Any, mask: Any, bounds: Any, position: Any, pool: Any) -> Any:
        weight = q.new_empty((q.shape[0], H, 2)) if op == "index_topk" else q.new_empty((3, H)).float()
        alone = [None, None, [], None, 0.1, 0.0, "", 1.0, pool]
        if op == "index_topk":
            alone = [None, None, None, [], 8, 0.1, LIGHTNING.text, "", False, None, pool]
            return variant.launch(q, k, weight, *alone, wrap=torch.library.wrap_triton)
        return variant.launch(q, k, v, weight, *alone, wrap=torch.library.wrap_triton)

    with inputs[0].fake_mode:
        graph = make_fx(run, tracing_mode="real")(*inputs).graph
    assert any("triton_kernel_wrapper" in str(n.target) for n in graph.nodes)
    length = inputs[1].shape[2]
    guards = inputs[0].fake_mode.shape_env.guards
    assert not dynamic or not any(guard.expr.has(length.node.expr) for guard in guards)
