"""load(): what was altered, what is for elsewhere, and arguments that do not fit are clear errors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import clsa_compile
from clsa_compile.errors import ClsaWarning, PackageError

Altered = Callable[..., Path]


def outputs(value: dict[str, Tensor]) -> list[Tensor]:
    return [value["out"], value["sum"]]


def test_a_module_runs_with_sizes_that_it_was_not_exported_with(small: Any, product: Any) -> None:
    module, arguments = product
    package = clsa_compile.load(small.path, digest=small.digest)
    assert package.digest == small.digest
    assert package.device == torch.device("cpu")
    for rows in (1, 5, 9):
        args, kwargs = arguments(rows)
        kwargs = dict(reversed(kwargs.items()))  # by name, in any order
        with torch.no_grad():
            expected = module(*args, **kwargs)
        torch.testing.assert_close(outputs(package(*args, **kwargs)), outputs(expected), rtol=1e-6, atol=1e-6)


def test_a_package_that_nobody_pins_says_what_to_pin(small: Any) -> None:
    with pytest.warns(ClsaWarning, match="is not pinned, and holds native code") as caught:
        clsa_compile.load(small.path)
    assert f"digest={small.digest!r}" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ClsaWarning)
        clsa_compile.load(small.path, digest=["clsa1:" + "0" * 64, small.digest])


def test_another_package_than_the_pinned_one_is_not_read(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("the archive was read")

    monkeypatch.setattr("clsa_compile.package.loading.Archive", never)
    with pytest.raises(PackageError, match="is not the package that is trusted"):
        clsa_compile.load(small.path, digest="clsa1:" + "0" * 64)


def test_bytes_that_change_are_noticed_before_torch_reads_them(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("torch read the archive")

    monkeypatch.setattr(torch.export, "load", never)
    good = small.path.read_bytes()
    path = tmp_path / "bad.pt2"
    # Headers lie at the start of each record and in the directory at the end.
    starts = [
        i for i in range(len(good) - 4) if good[i : i + 4] in (b"PK\3\4", b"PK\1\2", b"PK\5\6", b"PK\6\6")
    ]
    assert len(starts) > 20
    for start in starts:
        for place in range(start, min(start + 46, len(good)), 5):
            bad = bytearray(good)
            bad[place] ^= 0x10
            path.write_bytes(bytes(bad))
            with pytest.raises(PackageError, match=r"is damaged|is no clsa package"):
                clsa_compile.load(path)
    for length in (*range(0, len(good), len(good) // 25), len(good) - 1, len(good) - 90):
        path.write_bytes(good[:length])
        with pytest.raises(PackageError, match=r"is damaged|is no clsa package"):
            clsa_compile.load(path)


def edited(**changes: Any) -> Callable[[str, bytes], bytes]:
    """Changes fields of the manifest."""

    def change(name: str, data: bytes) -> bytes:
        return data if name != "package.json" else json.dumps({**json.loads(data), **changes}).encode()

    return change


def test_a_package_of_another_format(small: Any, tmp_path: Path, altered: Altered) -> None:
    for number, age in ((2, "a newer"), (0, "an older")):
        path = altered(small.path, tmp_path / f"{number}.pt2", edited(format=number))
        with pytest.raises(PackageError, match=f"was written by {age} clsa"):
            clsa_compile.load(path, digest=None)


def test_another_plan_in_the_same_package(small: Any, tmp_path: Path, altered: Altered) -> None:
    path = altered(small.path, tmp_path / "a.pt2", lambda n, d: b"[]" if n == "plan.json" else d)
    with pytest.raises(PackageError, match="holds another plan than the one that it was made with"):
        clsa_compile.load(path)


@pytest.mark.slow
def test_native_code_of_another_plan(decoder: Any, tmp_path: Path, altered: Altered) -> None:
    import hashlib

    plan = json.dumps([])
    digest = hashlib.sha256(plan.encode()).hexdigest()

    def change(name: str, data: bytes) -> bytes:
        return plan.encode() if name == "plan.json" else edited(plan=digest)(name, data)

    path = altered(decoder.path, tmp_path / "a.pt2", change)
    with pytest.raises(PackageError, match=r"the native code of 'prefill' .* is that of another plan"):
        clsa_compile.load(path)


def test_a_package_made_under_another_torch(decoder: Any, tmp_path: Path, altered: Altered) -> None:
    def change(name: str, data: bytes) -> bytes:
        if name != "package.json":
            return data
        found = json.loads(data)
        found["machine"]["torch"] = "2.5.0+cu130"
        return json.dumps(found).encode()

    path = altered(decoder.path, tmp_path / "a.pt2", change)
    expected = f"compiled under torch 2.5.0\\+cu130, and this is torch {torch.__version__.partition('+')[0]}"
    with pytest.raises(PackageError, match=expected):
        clsa_compile.load(path)


@pytest.mark.parametrize(("device", "reason"), [("cuda", "it was compiled for cpu"), ("abc", "is no device")])
def test_another_device(device: str, reason: str, decoder: Any) -> None:
    with pytest.raises(PackageError, match=reason):
        clsa_compile.load(decoder.path, device, digest=decoder.digest)


def test_no_file_at_all(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="there is no package at"):
        clsa_compile.load(tmp_path / "a.pt2")
    with pytest.raises(PackageError, match=r"there is no package at .*: it is no file"):
        clsa_compile.load(tmp_path)


def test_a_file_that_is_replaced_meanwhile(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pt2"
    shutil.copy(small.path, path)
    from clsa_compile.package import loading

    real = loading._runs

    def replaced(*args: Any) -> Any:
        shutil.copy(small.path, tmp_path / "b.pt2")
        os.replace(tmp_path / "b.pt2", path)
        return real(*args)

    monkeypatch.setattr(loading, "_runs", replaced)
    with pytest.raises(PackageError, match="was changed while it was loaded"):
        clsa_compile.load(path, digest=small.digest)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scale": 0.25}, "scale is 0.25; the program was made for 0.5"),
        ({"scale": True}, "scale is True; the program was made for 0.5"),
        (
            {"bias": torch.zeros(4, dtype=torch.float64)},
            "bias is torch.float64 on cpu; the program takes float32",
        ),
        ({"bias": torch.zeros(5)}, "bias has 5 in dimension 0; the program takes 4"),
        ({"bias": torch.zeros(1, 4)}, "bias has sizes .*the program takes"),
        ({"bias": torch.zeros(8)[::2]}, "not contiguous; the program takes"),
        ({"bias": 3}, "bias is a int; the program takes a tensor"),
        ({"other": 3}, "the arguments are nested as"),
        ({"rows": 65}, "has 65 in dimension 0; the program takes 1 to 64"),
        ({"rows": 0}, "has 0 in dimension 0; the program takes 1 to 64"),
        ({"pair": 3}, "has 3 in dimension 0, where another argument has 5"),
    ],
)
def test_arguments_that_the_program_was_not_made_for(
    change: dict[str, Any], reason: str, small: Any, product: Any
) -> None:
    package = clsa_compile.load(small.path, digest=small.digest)
    args, kwargs = product[1](change.pop("rows", 5))
    if "pair" in change:
        ((x, y),) = args
        args = ((x, y[: change.pop("pair")].contiguous()),)
    with pytest.raises(PackageError, match=reason):
        package(*args, **{**kwargs, **change})


def test_a_decoder_is_no_module_and_a_module_no_decoder(small: Any, decoder: Any) -> None:
    with pytest.raises(PackageError, match="this package is no decoder's"):
        clsa_compile.load(small.path, digest=small.digest).caches(1, 8)
    with pytest.raises(PackageError, match="this package is a decoder's; use caches"):
        clsa_compile.load(decoder.path, digest=decoder.digest)(torch.zeros(1))


def test_running_without_weights_is_an_error_and_no_crash(decoder: Any, llama: Any) -> None:
    package = clsa_compile.load(decoder.path, digest=decoder.digest)
    caches = package.caches(1, 8)
    with pytest.raises(PackageError, match="has no weights yet: they were left out when it was exported"):
        package.step(torch.zeros(1, 2, dtype=torch.long), caches)
    assert caches.used == 0
    package.bind(dict(llama.state_dict()))
    assert package.step(torch.zeros(1, 2, dtype=torch.long), caches).shape == (1, 128)


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        (torch.zeros(2, 3), r"ids are torch.float32 \[2, 3\] on cpu; give int64 \[2, S\]"),
        (torch.zeros(1, 3, dtype=torch.long), r"give int64 \[2, S\] on cpu"),
        (torch.zeros(2, 9, dtype=torch.long), "0 tokens and 9 more do not fit into caches for 8"),
        (torch.zeros(2, 0, dtype=torch.long), "a prompt of 0 tokens; the package was made for 2 to 256"),
    ],
)
def test_ids_that_do_not_fit(ids: Tensor, reason: str, decoder: Any, llama: Any) -> None:
    package = clsa_compile.load(decoder.path, digest=decoder.digest, weights=dict(llama.state_dict()))
    with pytest.raises(PackageError, match=reason):
        package.step(ids, package.caches(2, 8))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((1, 300), "has 300 in dimension 2; the program takes 2 to 256"),
        ((2000, 8), "has 2000 in dimension 0; the program takes 1 to 1024"),
        (
            (2, 8, torch.zeros(3, dtype=torch.long)),
            "padding has 3 in dimension 0, where another argument has 2",
        ),
        ((2, 8, torch.zeros(2)), "padding is torch.float32 on cpu; the program takes int64"),
    ],
)
def test_caches_that_do_not_fit(arguments: Any, reason: str, decoder: Any) -> None:
    package = clsa_compile.load(decoder.path, digest=decoder.digest)
    with pytest.raises(PackageError, match=reason):
        package.caches(*arguments)


def test_cuda_graphs_are_for_gpus(decoder: Any, small: Any) -> None:
    package = clsa_compile.load(decoder.path, digest=decoder.digest)
    with pytest.raises(PackageError, match="CUDA graphs are for CUDA devices, and this package is on cpu"):
        package.graphed(package.caches(1, 8))
    with pytest.raises(PackageError, match="this package is no decoder's"):
        clsa_compile.load(small.path, digest=small.digest).graphed(package.caches(1, 8))


def test_two_packages_side_by_side(decoder: Any, small: Any, llama: Any, product: Any) -> None:
    one = clsa_compile.load(decoder.path, digest=decoder.digest, weights=dict(llama.state_dict()))
    other = {name: value * 2 for name, value in llama.state_dict().items()}
    two = clsa_compile.load(decoder.path, digest=decoder.digest, weights=other)
    three = clsa_compile.load(small.path, digest=small.digest)
    ids = torch.arange(6).view(2, 3)
    caches = one.caches(2, 8), two.caches(2, 8)
    before = one.step(ids, caches[0])
    different = two.step(ids, caches[1])
    args, kwargs = product[1](3)
    assert outputs(three(*args, **kwargs))[0].shape == (3, 4)
    caches[0].reset()
    assert torch.equal(one.step(ids, caches[0]), before)
    assert not torch.allclose(before, different)


def test_what_a_package_says_of_itself(decoder: Any) -> None:
    package = clsa_compile.load(decoder.path, digest=decoder.digest)
    assert repr(package).startswith("Package(LlamaForCausalLM: prefill, decode; torch 2.")
    assert "2 dense with each key read once" in package.report
    assert [plan.count("attention") for plan in package.plans] == [1, 1]
    assert "torch.ops.clsa.attention" in package.texts["graphs/decode_after.py"]
    assert "torch.ops.clsa" not in package.texts["graphs/decode_lowered.py"]
    assert "scaled_dot_product_attention" in package.texts["graphs/decode_before.py"]


PROCESS = """
    import sys
    import torch

    class Refuse:
        def find_spec(self, name, *_):
            if name.split(".")[0] in {refused!r}:
                raise ImportError(name + " is not to be imported")

    sys.meta_path.insert(0, Refuse())
    {body}
"""


def fresh(body: str, refused: tuple[str, ...], *arguments: str) -> str:
    """Runs Python that cannot import some packages; returns what it prints."""
    text = textwrap.dedent(PROCESS).format(refused=refused, body=body)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", text, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_loading_needs_no_compiler_and_no_model_library(decoder: Any, llama: Any, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pt"
    torch.save(dict(llama.state_dict()), weights)
    body = """
import clsa_compile
package = clsa_compile.load(sys.argv[1], digest=sys.argv[2], weights=torch.load(sys.argv[3]))
caches = package.caches(1, 32)
tokens = [int(t) for t in package.generate(torch.arange(5)[None], caches, 8)]
names = ("torch._dynamo", "torch._inductor", "transformers", "triton", "sympy")
loaded = [name for name in names if name in sys.modules]
print(tokens, loaded)
"""
    refused = ("triton", "transformers", "sympy")
    found = fresh(body, refused, str(decoder.path), decoder.digest, str(weights))
    expected, ids = [], torch.arange(5)[None]
    for _ in range(8):
        with torch.no_grad():
            token = int(llama(ids).logits[0, -1].argmax())
        expected.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    assert found == f"{expected} []"


def test_torch_alone_runs_the_native_code(decoder: Any, llama: Any, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pt"
    known = dict(llama.named_buffers()) | dict(llama.state_dict())
    torch.save({f"model.{name}": value for name, value in known.items()}, weights)
    body = """
from torch._inductor.package import load_package
model = load_package(sys.argv[1], "decode")
known = torch.load(sys.argv[2])
wanted = {name: known[name] for name in model.get_constant_fqns()}
model.load_constants(wanted, check_full_update=True, user_managed=True)
caches = [torch.zeros(2, 2, 9, 32) for _ in range(2)]
length = torch.zeros((), dtype=torch.long)
logits = model(torch.tensor([[3], [4]]), caches, length, torch.zeros(2, dtype=torch.long))
print(logits.argmax(-1).tolist(), int(length))
"""
    found = fresh(body, ("clsa_compile",), str(decoder.path), str(weights))
    with torch.no_grad():
        logits = llama(torch.tensor([[3], [4]])).logits[:, -1]
    assert found == f"{logits.argmax(-1).tolist()} 1"
