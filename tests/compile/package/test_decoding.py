"""Decoders as packages, in a process of their own: tokens and caches equal eager's, for sizes not exported.

Native code of every family is slow to build: most run their exported programs; `--exhaustive` builds all.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import clsa_compile
from clsa_compile.config import Options
from clsa_compile.testing import tiny

FAMILIES = ("llama", "qwen3", "deepseek_v32", "glm_moe_dsa")
# Their like is among the others: native code of a dense decoder, and a sparse one as it is here.
STEPS = 16
# (batch, tokens of the prompt, slots of the cache); programs are traced with 3, 7 and others.
SIZES = ((1, 5, 40), (2, 12, 29), (4, 3, 33))

PROCESS = """
import json, sys, torch, clsa_compile
package = clsa_compile.load(sys.argv[1], digest=sys.argv[2])
for name, case in torch.load(sys.argv[3]).items():
    ids, size, padding = case
    caches = package.caches(len(ids), size, padding)
    for value in caches.tensors.values():
        value.fill_(0.25)  # what nobody writes stays
    tokens = torch.stack(list(package.generate(ids, caches, 16)), dim=1)
    logits = package.step(ids[:, :1].contiguous(), caches)
    torch.save((tokens, logits, caches.tensors, caches.length), f"{sys.argv[4]}/{name}.pt")
print(json.dumps([n for n in ("torch._inductor", "torch._dynamo", "transformers") if n in sys.modules]))
"""


def eager(model: Any, ids: torch.Tensor, size: int, padding: torch.Tensor | None) -> Any:
    """Returns tokens, the last logits and the cache of an eager model."""
    from transformers import StaticCache

    cache: Any = StaticCache(config=model.config, max_cache_len=size)
    with torch.no_grad():
        model(ids[:, :1], past_key_values=cache)
    cache.reset()
    for layer in cache.layers:
        for value in (v for v in vars(layer).values() if isinstance(v, torch.Tensor) and v.dim()):
            value.fill_(0.25)
    tokens, given = [], ids
    for step in range(STEPS + 1):
        settings: dict[str, Any] = {}
        if padding is not None:
            used = torch.arange(ids.shape[1] + step)[None]
            mask = used >= padding[:, None]
            positions = (used - padding[:, None]).clamp(min=0)[:, -given.shape[1] :]
            settings = {"attention_mask": mask.long(), "position_ids": positions}
        with torch.no_grad():
            logits = model(given, past_key_values=cache, **settings).logits[:, -1]
        if step == STEPS:
            return torch.stack(tokens, dim=1), logits, cache
        tokens.append(logits.argmax(-1))
        given = ids[:, :1] if step == STEPS - 1 else tokens[-1][:, None]
    raise AssertionError


def check(model: Any, package: Any, folder: Path, is_padded: bool, text: str = PROCESS) -> None:
    """Runs a package in a process of its own and compares with eager."""
    generator = torch.Generator().manual_seed(0)
    cases: dict[str, Any] = {}
    for batch, prompt, size in SIZES:
        ids = torch.randint(0, 128, (batch, prompt), generator=generator)
        padding = torch.arange(batch) % 3 if is_padded else None
        cases[f"{batch}_{prompt}_{size}"] = (ids, size, padding)
    torch.save(cases, folder / "cases.pt")
    arguments = [str(package.path), package.digest, str(folder / "cases.pt"), str(folder)]
    command = [sys.executable, "-W", "ignore", "-c", text, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, (ids, size, padding) in cases.items():
        tokens, logits, tensors, length = torch.load(folder / f"{name}.pt")
        expected, last, cache = eager(model, ids, size, padding)
        assert torch.equal(tokens, expected), name
        torch.testing.assert_close(logits, last, rtol=1e-5, atol=1e-5)
        used = ids.shape[1] + STEPS
        valid = torch.ones(len(ids), size, dtype=torch.bool)
        if padding is not None:
            # What padding leaves in its slots nobody attends to.
            valid = torch.arange(size)[None] >= padding[:, None]
        for i, layer in enumerate(cache.layers):
            assert torch.equal(length, layer.cumulative_length)
            for field in ("keys", "values", "indexer_keys"):
                if not hasattr(layer, field):
                    continue
                ours, theirs = tensors[f"{i}.{field}"], getattr(layer, field)
                mask = valid[:, :, None] if ours.dim() == 3 else valid[:, None, :, None]
                zero = torch.zeros(())
                difference = torch.where(mask, ours - theirs, zero).abs().max()
                assert difference < 1e-5, (name, field)
                free = ours[..., used:, :]
                assert torch.equal(free, torch.full_like(free, 0.25)), "slots that nobody writes"
    assert json.loads(done.stdout.splitlines()[-1]) == [] or "program" in str(package.path)


def exported(model: Any, path: Path, is_padded: bool, **settings: Any) -> Any:
    ids = torch.zeros(1, 4, dtype=torch.long)
    given = {"attention_mask": torch.ones_like(ids)} if is_padded else None
    return clsa_compile.export(model, (ids,), given, path=path, **settings)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "deepseek_v32" else pytest.mark.exhaustive)
        for name in FAMILIES
    ],
)
def test_exported_programs_equal_eager(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    is_padded = name in ("qwen3", "glm_moe_dsa")
    made = exported(model, tmp_path / "program.pt2", is_padded, format="program")
    actions = {site.action for site in made.report.sites}
    assert actions == {"sparse" if name in ("deepseek_v32", "glm_moe_dsa") else "attention"}
    check(model, made, tmp_path, is_padded)


@pytest.mark.slow
def test_native_code_equals_eager(decoder: Any, llama: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    # A checkpoint holds weights that are one only once, and may call them by another name than the package.
    weights = {name: value for name, value in llama.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, tmp_path / "model.safetensors")
    text = PROCESS.replace("digest=sys.argv[2]", f"digest=sys.argv[2], weights={str(tmp_path)!r}")
    check(llama, decoder, tmp_path, is_padded=True, text=text)


@pytest.mark.exhaustive
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_native_code_of_every_family_equals_eager(name: str, is_padded: bool, tmp_path: Path) -> None:
    model = tiny(name)
    made = exported(model, tmp_path / f"{name}.pt2", is_padded)
    check(model, made, tmp_path, is_padded)


def same_as_compiled(model: Any, made: Any, passes: Any, weights: Any = None) -> None:
    """Compares a package with what `torch.compile` makes of the model, for a prompt and a step after it."""
    from transformers import StaticCache

    package = clsa_compile.load(made.path, digest=made.digest, weights=weights)
    caches = package.caches(2, 32)
    cache: Any = StaticCache(config=model.config, max_cache_len=32)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        compiled = torch.compile(model, backend=passes)
        for given in (ids, ids[:, :1].contiguous()):
            expected = compiled(given, past_key_values=cache).logits[:, -1]
            torch.testing.assert_close(package.step(given, caches), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.exhaustive
def test_a_decoder_that_shares(tmp_path: Path, passes: Any) -> None:
    model = tiny("glm_moe_dsa")
    made = exported(model, tmp_path / "a.pt2", False, format="program", options={"share": 2})
    assert [plan.schedule for plan in made.report.plans] == ["FS", "FS"]
    passes.options = Options.read({"share": 2})
    same_as_compiled(model, made, passes)


@pytest.mark.slow
def test_a_plan_with_indices_that_were_trained(tmp_path: Path, passes: Any, index_plan: Any) -> None:
    """Their weights become part of the package, also where those of the model do not."""
    model = tiny("llama", num_hidden_layers=4)
    plan = index_plan(model)
    made = exported(model, tmp_path / "a.pt2", False, format="program", plan=plan, weights="outside")
    assert {site.action for site in made.report.plans[1].sites} == {"sparse"}
    passes.options = Options.read({"share": plan})
    # The model's own weights alone are given: it knows nothing of indices.
    same_as_compiled(model, made, passes, model.state_dict())
