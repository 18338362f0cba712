"""Machines: code runs where it was made for, and says why not elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from clsa_compile.package import machine
from clsa_compile.package.machine import describe, obstacle, release

CPU = torch.device("cpu")


def test_what_was_made_here_runs_here() -> None:
    made = describe(CPU)
    assert made["torch"] == torch.__version__
    assert obstacle(made, CPU) == ""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"torch": "2.11.0+cu130"}, "under torch 2.11.0+cu130, and this is torch 2.13"),
        ({"torch": "9.0.1"}, "export the model again, or install that torch"),
        ({"machine": "riscv64"}, "it was compiled for linux on riscv64, and this is linux on"),
        ({"processor": ["avx", "avx1024_x"]}, "a processor with avx1024_x, which this one has not"),
        ({"device": "cuda"}, "it was compiled for cuda; export the model again on cpu"),
    ],
)
def test_what_was_made_elsewhere_is_refused(change: dict[str, Any], reason: str) -> None:
    found = obstacle({**describe(CPU), **change}, CPU)
    if change.get("torch", "").startswith("2.11") and release(str(torch.__version__)) == "2.11":
        assert found == ""
    else:
        assert reason in found


def test_a_patch_release_and_another_build_are_the_same_release() -> None:
    version = release(str(torch.__version__))
    assert obstacle({**describe(CPU), "torch": f"{version}.7+cu999"}, CPU) == ""


class H100:
    major, minor, name = 9, 0, "NVIDIA H100"


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ([9, 0], ""),
        ([8, 0], "machine code for sm 8.0"),
        ([10, 0], "is 9.0"),
        ([9, 1], "machine code for sm 9.1"),
    ],
)
def test_kernels_run_on_their_own_generation(
    capability: list[int], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: H100())
    device = torch.device("cuda", 0)
    made = describe(device)
    assert (made["name"], made["capability"]) == ("NVIDIA H100", [9, 0])
    found = obstacle({**made, "capability": capability}, device)
    assert reason in found
    assert bool(found) == bool(reason)


def test_no_gpu_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    made = {**describe(CPU), "device": "cuda", "capability": [9, 0], "name": "NVIDIA H100"}
    assert (
        obstacle(made, torch.device("cuda")) == "it was compiled for cuda, and there is no CUDA device here"
    )


def test_a_processor_that_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise OSError

    monkeypatch.setattr(machine.Path, "read_text", fail)
    assert describe(CPU)["processor"] == []
