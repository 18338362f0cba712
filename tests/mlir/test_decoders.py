"""Whole decoders: both forms of their steps, and linalg that computes what torch computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from clsa_compile.mlir import Folder, write
from clsa_compile.testing import load_script, tiny

pytestmark = pytest.mark.mlir
ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5
DENSE = {"topk": 8, "share": "FS", "keep_first": 1, "keep_last": 2}
# Experts as one product: torch-mlir has no histogram, with which the other ways count tokens.
MODELS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "llama": (DENSE, {"attention_mass": 1, "select_topk": 1, "sparse_attention": 1}),
    "qwen3": (DENSE, {"attention_mass": 1, "select_topk": 1, "sparse_attention": 1}),
    "glm_moe_dsa": ({"share": 2}, {"index_topk": 1, "sparse_attention": 2}),
    "deepseek_v32": ({"share": 2}, {"index_topk": 1, "sparse_attention": 2}),
}
MARKS = dict.fromkeys(("qwen3", "deepseek_v32"), pytest.mark.exhaustive) | {"glm_moe_dsa": pytest.mark.slow}
CASES = [pytest.param(name, marks=MARKS.get(name, ())) for name in MODELS]


def compare(folder: Folder, name: str, program: ExportedProgram, calls: list[Any]) -> None:
    """Runs a program in torch and as linalg, and compares outputs and all that is written."""
    engine, module = folder.engine(name), program.module()
    for args in calls:
        compare_call(folder, name, engine, module, args)


def compare_call(folder: Folder, name: str, engine: Any, module: Any, args: Any) -> None:
    leaves = torch.utils._pytree.tree_leaves(args)
    inputs = [a.name for a in folder.manifest.programs[name].arguments if not a.tensor]
    found = engine(dict(zip(inputs, [leaf.clone() for leaf in leaves], strict=True)))
    with torch.no_grad():
        wanted = module(*args)  # writes its arguments
    torch.testing.assert_close(found.pop("output_0"), wanted, atol=TOLERANCE, rtol=0)
    written = dict(zip(inputs, leaves, strict=True))
    assert set(found) >= {n for n, x in written.items() if x.dim() > 2}, "a cache is missing"
    for key, value in found.items():
        torch.testing.assert_close(value, written[key], atol=TOLERANCE, rtol=0)


def operators(folder: Folder, program: str) -> dict[str, int]:
    """The contract ops that torch's dialect keeps, read from the file."""
    found = folder.parsed(program, "torch").operators
    return {n.removeprefix("torch.clsa."): count for n, count in found.items() if "clsa" in n}


@pytest.mark.parametrize("name", CASES)
def test_a_decoders_step(
    name: str,
    tmp_path: Path,
    rewritten: Callable[..., ExportedProgram],
    varying: dict[int, Any],
    call: Callable[..., Any],
) -> None:
    options, kept = MODELS[name]
    model: Any = tiny(name)
    if name.endswith(("v32", "dsa")):
        model.set_experts_implementation("batched_mm")
    step, args = call(model)
    program = rewritten(step, args, options, varying)
    write({"decode": program}, tmp_path / "out", inner="model")
    folder = Folder.read(tmp_path / "out")
    assert operators(folder, "decode") == kept
    known = model.state_dict().keys()
    arguments = folder.manifest.programs["decode"].arguments
    assert {a.tensor for a in arguments if a.kind == "parameter"} <= known
    calls = [call(model, *sizes)[1] for sizes in ((2, 48, 40), (1, 20, 19), (3, 300, 130))]
    compare(folder, "decode", program, calls)


class Held:
    """A store over a tensor that is given."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def write(self, new: Tensor, positions: Tensor) -> Tensor:
        self.data.index_copy_(-2, positions, new)
        return self.data


class YocoStep(nn.Module):
    """The decoder of `examples/yoco_decoder.py` over stores that are arguments."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, positions: Tensor, stores: list[Tensor]) -> Tensor:
        cache = self.model.new_cache(1, 1)
        held = iter([Held(store) for store in stores])
        cache.own = [(next(held), next(held)) for _ in cache.own]
        cache.shared = next(held), next(held)
        cache.index = list(held)
        cache.stores, cache.length = [], stores[0].shape[-2]
        return self.model(ids, positions, cache)


@pytest.mark.slow
def test_the_yoco_models_prompt_and_step(
    tmp_path: Path, rewritten: Callable[..., ExportedProgram], varying: dict[int, Any]
) -> None:
    example = load_script(ROOT / "examples/yoco_decoder.py")
    torch.manual_seed(0)
    config = example.Config(
        attention="yoco-clsa", vocabulary=64, layers=4, hidden=32, ffn=48, heads=4, kv_heads=2, head_dim=8,
        window=6, topk=7, index_dim=8,
    )  # fmt: skip
    model = example.Decoder(config).eval()
    rows, (batch, length) = 23, varying

    def arguments(batch: int, length: int, rows: int, start: int) -> Any:
        cache = model.new_cache(batch, length)
        ids = torch.randint(0, 64, (batch, start + rows), generator=torch.Generator().manual_seed(length))
        if start:
            with torch.no_grad():
                model(ids[:, :start], torch.arange(start), cache)
        return ids[:, start:], torch.arange(start, start + rows), [store.data for store in cache.stores]

    ranges = {**varying, rows: Dim("S", min=9, max=4096)}
    programs = {
        "prefill": rewritten(YocoStep(model), arguments(batch, length, rows, 0), {}, ranges),
        "decode": rewritten(YocoStep(model), arguments(batch, length, 1, 6), {}, ranges),
    }
    write(programs, tmp_path / "out", inner="model")
    folder = Folder.read(tmp_path / "out")
    wanted = {"attention": 2, "index_topk": 1, "sparse_attention": 2}
    assert [operators(folder, name) for name in programs] == [wanted] * 2
    assert len(folder.weights()) == len(list(model.parameters())), "both programs read the same weights"
    prompts = ((2, 48, 20, 0), (1, 130, 100, 30))
    compare(folder, "prefill", programs["prefill"], [arguments(*sizes) for sizes in prompts])
    steps = ((2, 48, 1, 40), (1, 12, 1, 3), (3, 300, 1, 299))
    compare(folder, "decode", programs["decode"], [arguments(*sizes) for sizes in steps])


def smollm2(layers: int) -> Any:
    """SmolLM2-135M by its configuration, with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, rope_theta=100000.0,
        rms_norm_eps=1e-5, tie_word_embeddings=True,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("layers", [2, pytest.param(30, marks=pytest.mark.exhaustive)])
def test_the_text_of_a_real_decoder_holds_no_weights(
    layers: int,
    tmp_path: Path,
    rewritten: Callable[..., ExportedProgram],
    varying: dict[int, Any],
    call: Callable[..., Any],
) -> None:
    model = smollm2(layers)
    step, args = call(model)
    program = rewritten(step, args, {"topk": 256, "share": 4}, varying)
    write({"decode": program}, tmp_path / "out", weights=False)
    folder = Folder.read(tmp_path / "out")
    assert operators(folder, "decode")["sparse_attention"] >= layers // 2
    sizes = {name: info.bytes for name, info in folder.manifest.files.items()}
    # A layer's text, and that of a selection, which four layers share.
    assert sizes["decode.torch.mlir"] < 15e3 + 15e3 * layers
    assert sizes["decode.linalg.mlir"] < 150e3 + 60e3 * layers
    for form in ("torch", "linalg"):
        text = (tmp_path / "out" / f"decode.{form}.mlir").read_text()
        assert "dense_resource" not in text
        assert folder.parsed("decode", form).text == text
