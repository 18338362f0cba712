"""Tensors of plans: their digest sees every bit, their file is whole and theirs, copies are shared."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clsa_compile.errors import PlanError
from clsa_compile.ir.tensors import beside, digest, placed, read, write


def made() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"a": torch.randn(4, 3, generator=generator), "b": torch.randn(5, generator=generator).bfloat16()}


def test_a_digest_sees_names_shapes_dtypes_and_bits() -> None:
    same = digest(made())
    assert digest(dict(reversed(made().items()))) == same, "order means nothing"
    assert digest({}) == ""
    flipped = made()
    flipped["a"][0, 0] = torch.nextafter(flipped["a"][0, 0], torch.tensor(9.0))
    for other in (
        flipped,
        {**made(), "a": made()["a"].T.contiguous()},
        {**made(), "b": made()["b"].float()},
        {"c": made()["a"], "b": made()["b"]},
    ):
        assert digest(other) != same


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    path = beside(tmp_path / "plan.json", digest(made()))
    assert path.name == f"plan.{digest(made())[:12]}.safetensors"
    write(path, made())
    found = read(path, digest(made()))
    assert all(torch.equal(found[name], tensor) for name, tensor in made().items())


@pytest.mark.parametrize("break_it", ["missing", "cut", "altered", "another"])
def test_a_broken_file_is_an_error_that_names_it(break_it: str, tmp_path: Path) -> None:
    path = tmp_path / f"{break_it}.safetensors"
    write(path, made())
    content = path.read_bytes()
    if break_it == "missing":
        path.unlink()
    elif break_it == "cut":
        path.write_bytes(content[:-7])
    elif break_it == "altered":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        write(path, {"a": torch.zeros(1)})
    with pytest.raises(PlanError, match=re.escape(str(path))):
        read(path, digest(made()))


def test_copies_in_a_dtype_are_shared_while_somebody_holds_one() -> None:
    tensor = torch.randn(8)
    first = placed(tensor, torch.device("cpu"), torch.bfloat16)
    assert placed(tensor, torch.device("cpu"), torch.bfloat16) is first
    assert placed(tensor, torch.device("cpu"), torch.float32) is not tensor, "a graph must not change a plan"
    assert first.dtype == torch.bfloat16
    address = first.data_ptr()
    first.fill_(7)
    del first
    gc.collect()
    again = placed(tensor, torch.device("cpu"), torch.bfloat16)
    assert torch.equal(again, tensor.bfloat16()), address
