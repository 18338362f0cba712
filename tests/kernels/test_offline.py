"""kernels/offline.py: what it reports, and that kernels write only what they may."""

import logging
from typing import Any

import pytest
import torch
import triton
from torch._higher_order_ops import triton_kernel_wrap
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

from clsa_compile.kernels import offline
from clsa_compile.kernels.offline import Usage, problem, recorded

# The parameters that some kernel writes. Anything else is an input, and a cache may be one.
WRITTEN = {
    "attention_decode": {"part_ptr", "peak_ptr", "total_ptr", "out_ptr", "lse_ptr", "below_ptr", "tops_ptr"},
    "attention_mass": {"mass_ptr"},
    "attention_mass_rows": {"mass_ptr"},
    "select_keep": {"scores_ptr"},
    "attention_rows": {"out_ptr", "lse_ptr"},
    "sparse_attention": {"part_ptr", "peak_ptr", "total_ptr", "out_ptr"},
    "merge_rows": {"tokens_ptr", "readers_ptr", "count_ptr"},
    "sparse_attention_rows": {"out_ptr"},
    "combine": {"out_ptr", "lse_ptr"},
    "index_scan_decode": {"scores_ptr"},
    "index_scan_rows": {"scores_ptr"},
    "select_pick": {"list_ptr", "info_ptr"},
    "select_emit": {"out_ptr"},
}


def test_limits() -> None:
    fine = Usage(registers=90, stack=0, shared=100_000, seconds=0.1)
    assert problem(fine, 90) == ""
    assert "shared" in problem(Usage(90, 0, 200_000, 0.1), 80)
    assert problem(Usage(90, 0, 200_000, 0.1), 90) == ""
    assert "spills" in problem(Usage(255, 8, 0, 0.1), 90)
    assert problem(Usage(255, 8, 0, 0.1), 80) == ""


def test_every_template_is_recorded() -> None:
    assert {launch.kernel.__name__ for _, launch in recorded()} == set(WRITTEN)


def test_one_kernel_compiles(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    one = next(recorded())
    monkeypatch.setattr(offline, "recorded", lambda: iter([one]))
    assert offline.main(["--arch", "90"]) == 0
    assert "no violations" in capsys.readouterr().out


def test_a_violation_is_an_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    one = next(recorded())
    monkeypatch.setattr(offline, "recorded", lambda: iter([one]))
    monkeypatch.setitem(offline.SHARED_LIMIT, 90, 1)
    assert offline.main(["--arch", "90"]) == 1
    assert "bytes of shared memory" in capsys.readouterr().out


@pytest.mark.exhaustive
def test_every_kernel_compiles_for_every_chip(capsys: Any) -> None:
    assert offline.main([]) == 0, capsys.readouterr().out


class H100:
    """Just enough of a driver for Triton to write its first intermediate code."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def test_kernels_write_only_what_they_may(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As Inductor sees it: a cache that looks written to would be copied at every step."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(type(triton.runtime.driver), "active", H100())
    seen = set()
    with caplog.at_level(logging.WARNING):
        for description, launch in recorded():
            with FakeTensorMode():
                arguments = {
                    name: torch.empty(value.shape, dtype=value.dtype)
                    if isinstance(value, torch.Tensor)
                    else value
                    for name, value in launch.arguments.items()
                    if not name.startswith("num_")
                }
            written = mutated(launch.kernel, arguments)
            name = launch.kernel.__name__
            seen.add(name)
            assert written, description
            assert written <= WRITTEN[name], description
    assert seen == set(WRITTEN)
    assert "assuming every input is mutated" not in caplog.text


def mutated(kernel: Any, arguments: dict[str, Any]) -> set[str]:
    if hasattr(triton_kernel_wrap, "identify_accessed_tensors"):
        found = triton_kernel_wrap.identify_accessed_tensors(kernel, arguments, {})
        return {dep.name for dep in found.read_writes.writes}
    return set(triton_kernel_wrap.identify_mutated_tensors(kernel, arguments, {}))
