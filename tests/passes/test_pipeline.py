"""The pipeline: decides before anything changes, verifies after each pass, and knows itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clsa_compile.errors import ClsaError, PassError, VerifyError
from clsa_compile.ir.captured import Captured
from clsa_compile.passes import pipeline
from clsa_compile.passes.pipeline import carry_out, decide, uuid

Trace = Callable[..., Captured]


def attend(x: Tensor, cache: Tensor) -> Tensor:
    cache.add_(1.0)
    return F.scaled_dot_product_attention(x, cache, cache)


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 4, 3, 8), torch.randn(2, 4, 6, 8)


def run(captured: Captured, **observe: Any) -> Any:
    return carry_out(captured, decide(captured), (), lambda kernel: kernel, **observe)


def test_deciding_changes_no_live_node(trace: Trace) -> None:
    captured = trace(attend, *inputs())
    before = captured.module.code
    decision = decide(captured)
    assert captured.module.code == before
    assert decision.plan.count("attention") == 1
    torch.testing.assert_close(captured.module(*inputs()), attend(*inputs()))


def test_every_stage_is_seen_and_computes_the_same(trace: Trace) -> None:
    seen: dict[str, Tensor] = {}

    def look(stage: str, captured: Captured) -> None:
        seen[stage] = captured.module(*inputs())

    run(trace(attend, *inputs()), observe=look)
    assert list(seen) == ["rewritten", "lowered"]
    for stage, out in seen.items():
        torch.testing.assert_close(out, attend(*inputs()), msg=stage)


@pytest.mark.parametrize("name", ["canonicalize", "match", "plan", "rewrite", "lower"])
def test_a_failure_names_its_pass_and_keeps_its_cause(
    name: str, trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("missing")

    monkeypatch.setattr(pipeline, name, broken)
    with pytest.raises(PassError, match=f"the pass '{name}' failed: KeyError: 'missing'") as error:
        run(trace(attend, *inputs()))
    assert isinstance(error.value.__cause__, KeyError)
    assert isinstance(error.value, ClsaError)


def test_what_is_raised_on_purpose_is_not_wrapped(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise VerifyError("on purpose")

    monkeypatch.setattr(pipeline, "lower", broken)
    with pytest.raises(VerifyError, match=r"^on purpose$"):
        run(trace(attend, *inputs()))


def test_interrupts_are_not_wrapped(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "match", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(trace(attend, *inputs()))


def test_a_pass_that_loses_a_mutation_is_caught(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(captured: Captured, sites: Any, plan: Any, tensors: Any) -> Captured:
        (write,) = [n for n in captured.graph.nodes if "add_" in n.name]
        write.replace_all_uses_with(write.args[0])
        captured.graph.erase_node(write)
        return captured

    monkeypatch.setattr(pipeline, "rewrite", careless)
    with pytest.raises(VerifyError, match="after rewrite: mutations were lost or moved: add_"):
        run(trace(attend, *inputs()))


def test_a_pass_that_leaves_a_contract_op_is_caught(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "lower", lambda captured, *_: (captured, ()))
    with pytest.raises(VerifyError, match="after lower: the contract op attention"):
        run(trace(attend, *inputs()))


def test_the_identity_covers_every_source_that_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(pipeline.__file__).resolve().parents[1] / "clsa_compile"
    assert re.fullmatch(r"[0-9a-f]{16}", uuid())
    copy = tmp_path / "clsa_compile"
    for folder in ("ir", "policies", "passes", "kernels", "capture"):
        for path in (root / folder).resolve().rglob("*"):
            if path.suffix in (".py", ".jinja"):
                target = copy / folder / path.relative_to((root / folder).resolve())
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    (copy / "backend.py").write_bytes((root / "backend.py").read_bytes())
    monkeypatch.setattr(pipeline, "files", lambda package: copy)

    def identity() -> str:
        return uuid.__wrapped__()

    first = identity()
    assert first == uuid(), "the copy is the same"
    templates = sorted(copy.rglob("*.jinja"))
    changed = [
        copy / "ir" / "masks.py", copy / "passes" / "patterns" / "eager.py",
        copy / "capture" / "dynamo.py", copy / "backend.py", *templates[:2],
    ]  # fmt: skip
    assert templates, "a kernel's text is part of every key"
    for path in changed:
        text = path.read_text()
        path.write_text(text + "\n# changed\n")
        assert identity() != first, path.name
        path.write_text(text)
    assert identity() == first
    (copy / "passes" / "new.py").write_text("")
    assert identity() != first, "a new file counts"
