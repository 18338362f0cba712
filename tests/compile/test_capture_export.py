"""torch.export's programs as captured graphs: the same sites as through Dynamo, and back again."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clsa_compile.backend import decided
from clsa_compile.capture.export import (
    callable_module,
    capture_program,
    constants_of,
    exported,
    inside,
    trace,
    without_weights,
)
from clsa_compile.config import Options
from clsa_compile.errors import CaptureError
from clsa_compile.passes.emit import Emitter
from clsa_compile.passes.pipeline import carry_out


class Masked(nn.Module):
    """Attention under a mask made of a small constant, in a submodule, with a write in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(16, 16)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        seen.add_(1)
        q = self.inner(x.double().float()).view(x.shape[0], x.shape[1], 2, 8).transpose(1, 2)
        first = torch.tensor([1])
        kv = torch.arange(x.shape[1])
        return F.scaled_dot_product_attention(
            q, q, q, attn_mask=(kv >= first)[None, None, None].expand(1, 1, x.shape[1], -1)
        )


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Masked()

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        return self.model(x, seen)


def arguments(rows: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(2, rows, 16, generator=torch.Generator().manual_seed(rows)), torch.zeros(())


def traced() -> tuple[Wrapper, torch.export.ExportedProgram]:
    module = Wrapper().eval()
    rows = torch.export.Dim("rows", min=2, max=32)
    return module, trace(module, arguments(), {}, ({1: rows}, None))


def test_names_masks_and_sources_are_those_of_the_model() -> None:
    _, program = traced()
    assert torch.ops.aten._assert_tensor_metadata.default in {n.target for n in program.graph.nodes}
    captured = capture_program(program, "model")
    assert torch.ops.aten._assert_tensor_metadata.default not in {n.target for n in captured.graph.nodes}
    (site,) = decided(captured, Options()).sites.attention
    assert "model" not in site.path
    # The constant is part of the predicate: it was spelled out.
    assert site.mask.predicate is not None
    sources = [getattr(n, "_dynamo_source", None) for n in captured.graph.nodes if n.op == "placeholder"]
    assert sources[0].name == "L['self']._modules['inner']._parameters['weight']"


def test_a_rewritten_program_is_saved_and_does_what_the_module_does() -> None:
    module, program = traced()
    captured = capture_program(program, "model")
    kept = {}

    def observe(stage: str, graph: object) -> None:
        if stage == "rewritten":
            kept["program"] = exported(program, captured)

    captured, _ = carry_out(captured, decided(captured, Options()), (), lambda kernel: kernel, observe)
    buffer = io.BytesIO()
    torch.export.save(kept["program"], buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    assert torch.ops.clsa.attention.default in {n.target for n in loaded.graph.nodes}
    lowered = callable_module(program, captured)
    for rows in (5, 9):
        x, seen = arguments(rows)
        with torch.no_grad():
            expected = module(x, seen)
            for form in (kept["program"].module(), loaded.module(), lowered):
                seen = torch.zeros(())
                torch.testing.assert_close(form(x, seen), expected, rtol=1e-6, atol=1e-6)
                assert seen == 1
    assert not any("clsa" in str(n.target) for n in lowered.graph.nodes)


def test_tensors_that_passes_add_become_constants() -> None:
    module, program = traced()
    captured = capture_program(program, "model")
    captured.module.register_buffer("table", torch.full((8,), 2.0))
    output = next(n for n in captured.graph.nodes if n.op == "output")
    (out,) = output.args[0]
    with captured.graph.inserting_before(output):
        table = captured.graph.get_attr("table")
        with captured.fake_mode:
            table.meta["val"] = torch.empty(8)
        scaled = Emitter(captured, out).call(torch.ops.aten.mul.Tensor, out, table)
    output.args = ((scaled,),)
    made = exported(program, captured)
    assert {"clsa_table"} == made.constants.keys() - program.constants.keys()
    x, seen = arguments()
    with torch.no_grad():
        torch.testing.assert_close(made.module()(x, seen), module(x, seen) * 2)


def test_stubs_stand_for_weights() -> None:
    _, program = traced()
    hollow = without_weights(program)
    assert {value.numel() for value in hollow.state_dict.values()} == {1}
    assert {type(v) for v in hollow.state_dict.values()} == {nn.Parameter}
    assert set(constants_of(hollow)) >= {"model.inner.weight", "model.inner.bias"}
    assert program.state_dict["model.inner.weight"].numel() == 256


def test_what_torch_cannot_prove_is_asserted() -> None:
    class Even(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(2, -1) if x.shape[0] % 2 == 0 else x

    rows = torch.export.Dim("rows", min=2, max=32)
    program = trace(Even(), (torch.zeros(6),), {}, ({0: rows},))
    module = program.module()
    assert module(torch.zeros(8)).shape == (2, 4)
    with pytest.raises((RuntimeError, AssertionError)):
        module(torch.zeros(7))


def test_what_cannot_be_traced() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(CaptureError, match=r"torch.export failed: GuardOnDataDependentSymNode"):
        trace(Branches(), (torch.zeros(2),), {}, None)


@pytest.mark.parametrize(
    ("path", "inner", "name"),
    [("model.a.b", "model", "a.b"), ("model", "model", ""), ("a.b", "", "a.b"), ("c_0", "model", "c_0")],
)
def test_names_inside_of_a_wrapper(path: str, inner: str, name: str) -> None:
    assert inside(path, inner) == name
