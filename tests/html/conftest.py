"""Reports that are made up: as many layers as wanted, of every kind that a page shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sympy import Integer

from clsa_compile.ir.plan import Group, Plan, SitePlan
from clsa_compile.ir.routing import Pool
from clsa_compile.layers import Index, Layer
from clsa_compile.prediction import Cost, Operation, Prediction, T
from clsa_compile.report import Details, Report
from clsa_compile.sources import Call, Kernel, Sources

DENSE = Cost(1024 * T, 2048 * T, 0.02 * T + 3)
SPARSE = Cost(2**21 + T, Integer(2**22), 0.001 * T + 9)
SELECTION = Cost(8 * T, Integer(0), Integer(10))
REST = Cost(Integer(5 * 10**9), Integer(5 * 10**9), Integer(1500))
KERNEL = """import triton


@triton.jit
def attention_decode(q_ptr, H: tl.constexpr):
    # a < b & c
    pass
"""

Make = Callable[..., Report]


def site(i: int, action: Any, index: bool, reason: str = "") -> SitePlan:
    return SitePlan(
        ordinal=i,
        layer=i,
        path=f"model.layers.{i}.self_attn",
        kind="topk" if index else "dense",
        action=action,
        reason=reason,
        heads=32,
        kv_heads=8,
        scale=0.125,
        mask="kv <= q",
        topk=2048 if action == "sparse" else 0,
    )


def layer(entry: SitePlan, index: bool) -> Layer:
    is_left = entry.action == "left"
    return Layer(
        ordinal=entry.ordinal,
        layer=entry.layer,
        path=entry.path,
        kind=entry.kind,
        action=entry.action,
        runs={"sparse": "2048 tokens by its own index", "left": "left as it was"}.get(
            entry.action, "dense, each key read once"
        ),
        reason=entry.reason,
        source=f"modeling_toy.py:{40 + entry.ordinal} in forward: weights = scores.softmax(-1)",
        kernels=() if is_left else ("index_topk.decode", "sparse_attention.gather"),
        batch=1,
        queries=1,
        keys=131072,
        heads=0 if is_left else 32,
        kv_heads=0 if is_left else 8,
        width=128,
        value_width=128,
        dtype="" if is_left else "bfloat16",
        scale=0.125,
        mask="" if is_left else "kv <= add_1(0)",
        cache="" if is_left else "static",
        index=Index("sum(weight * relu(dot))", 64, 128, 1.0, 2048, "kv <= q", "") if index else None,
    )


def prediction(sparse: list[int], dense: list[int]) -> Prediction:
    layers = {i: (DENSE, SPARSE) for i in sparse} | {i: (DENSE, DENSE) for i in dense}
    before = sum((pair[0] for pair in layers.values()), REST)
    after = sum((pair[1] for pair in layers.values()), REST)
    operations = (
        (Operation("attention", tuple(layers), DENSE),),
        tuple(
            Operation(name, tuple(ordinals), cost)
            for name, ordinals, cost in (
                ("sparse attention", sparse, SPARSE),
                ("dense attention", dense, DENSE),
                ("selection", sparse, SELECTION),
            )
            if ordinals
        ),
    )
    return Prediction(
        "a chip", 1, 1, before, after, layers, 2100 if sparse else None, {}, operations, 3.35e12, 9.89e14
    )


@pytest.fixture(scope="session")
def make() -> Make:
    """Makes a report of `count` layers.

    kind: "index" (an indexer in each, one for every `every` runs), "mass" (each `every`-th chooses for those
    after it) or "dense". left: ordinals that are left. keys: layers whose keys and values the one before the
    first of them has. The path of layer 0 is `path`, where that is given.
    """

    def made(
        count: int = 8,
        kind: str = "index",
        every: int = 4,
        left: tuple[int, ...] = (),
        keys: tuple[int, ...] = (),
        path: str = "",
    ) -> Report:
        has_index = kind == "index"
        starts = range(0, count, every)
        members = {s: tuple(i for i in range(s, min(s + every, count)) if i not in left) for s in starts}
        follow = {s: tuple(i for i in m if i != s) for s, m in members.items()}
        sparse = [i for s in starts for i in (members[s] if has_index else follow[s]) if kind != "dense"]
        sites = [
            site(i, "left" if i in left else "sparse" if i in sparse else "attention", has_index, "")
            for i in range(count)
        ]
        reason = "users: softmax is also used by amax"
        sites = [site(s.ordinal, "left", False, reason) if s.ordinal in left else s for s in sites]
        if path:
            sites[0] = SitePlan(0, 0, path, sites[0].kind, sites[0].action)
        groups, pools = [], []
        for start in starts:
            if has_index:
                groups.append(Group("index", start, members[start], 2048, "score"))
            elif kind == "mass" and follow[start]:
                groups.append(Group("mass", start, follow[start], 2048))
                pools.append(Pool(start, 2048, {start: ((0.5, 0.25, 0.25),)}, follow[start]))
        if keys:
            groups.append(Group("kv", min(keys) - 1, (min(keys) - 1, *keys), 0))
        plan = Plan(
            tuple(sites),
            tuple(groups),
            "F" + "S" * (every - 1),
            tuple(i for s in starts for i in follow[s]) if has_index else (),
            (),
            tuple(pools),
        )
        layers = tuple(layer(s, has_index and s.action != "left") for s in sites)
        dense = [s.ordinal for s in sites if s.action == "attention"]
        paths = tuple(s.path for s in sites if s.action != "left")
        call = Call("sparse_attention.gather", paths, {"H": 32, "SCALE": 0.125, "num_warps": 4})
        sources = Sources("a chip", (Kernel("attention_decode_0123456789abcdef", KERNEL, (call,)),))
        details = Details(layers, prediction(sparse, dense), sources)
        return Report((plan,), details=(details,), lengths=(4096, 131072))

    return made
