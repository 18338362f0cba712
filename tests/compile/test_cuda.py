"""On a real GPU: whole models through Inductor and the generated kernels. Marked `gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from clsa_compile.config import Options
from clsa_compile.kernels.sparse_attention.rows import LEAST_ROWS
from clsa_compile.testing import Transcript, generate_steps, largest_difference, tiny

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


# gpt_oss comes with eager attention only.
CASES = [(f, a) for f in ("llama", "glm_moe_dsa", "gemma2", "gemma3n_text") for a in ("sdpa", "eager")]


@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize(("family", "attention"), [*CASES, ("gpt_oss", "eager")])
def test_fp32_equals_eager(family: str, attention: str, cache: str) -> None:
    model = tiny(family, attention).cuda()
    expected = generate_steps(model, model.config, cache=cache)
    actual = generate_steps(torch.compile(model, backend="clsa"), model.config, cache=cache)
    assert largest_difference(expected, actual) < 1e-4
    assert counters["clsa"]["left"] == 0
    assert counters["clsa"]["sites"] > 0


@pytest.mark.parametrize("family", ["llama", "glm_moe_dsa"])
def test_bf16_is_within_the_budget_of_eager(family: str) -> None:
    model = tiny(family, head_dim=64 if family == "llama" else 8).cuda()
    exact = generate_steps(model, model.config)
    half = model.to(torch.bfloat16)
    expected = generate_steps(half, model.config)
    actual = generate_steps(torch.compile(half, backend="clsa"), model.config)
    budget = 2 * largest_difference(exact, expected) + 1e-2
    assert largest_difference(exact, actual) < budget


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_a_prompt_read_in_blocks_of_rows_equals_eager(cache: str) -> None:
    from torch._inductor.utils import run_and_get_code

    model = tiny("glm_moe_dsa").cuda()
    sizes: dict[str, Any] = {"cache": cache, "prompt": LEAST_ROWS + 13, "length": 2 * LEAST_ROWS, "steps": 4}
    expected = generate_steps(model, model.config, **sizes)
    run = torch.compile(model, backend="clsa")
    actual, codes = run_and_get_code(lambda: generate_steps(run, model.config, **sizes))
    assert largest_difference(expected, actual) < 1e-4
    assert "sparse_attention_rows" in "\n".join(codes)


@pytest.mark.parametrize("family", ["llama", "glm_moe_dsa"])
def test_a_cuda_graph_captured_short_replays_right_at_a_longer_length(family: str) -> None:
    model = tiny(family, max_position_embeddings=512).cuda()
    run = torch.compile(model, backend="clsa", options={"mode": "reduce-overhead"})
    expected = generate_steps(model, model.config, steps=40, length=64, prime=model)
    actual = generate_steps(run, model.config, steps=40, length=64, prime=model)
    assert largest_difference(expected, actual) < 1e-4


@pytest.mark.parametrize(
    "changes",
    [{}, {"scope": "kv_head"}, {"share": "FSRSS", "pool": 14}, {"dense_below": 18}],
    ids=["layer", "kv_head", "reindex", "dense_below"],
)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_dense_model_that_shares_equals_the_references(
    mode: str, changes: dict[str, Any], passes: Any
) -> None:
    """The same rewrite on the CPU runs references; the oracle of test_dense_sharing.py holds for those."""
    options = {"topk": 8, "share": 2, "keep_first": 2, "keep_last": 3, **changes}
    model = tiny("llama", num_hidden_layers=5)
    passes.options = Options.read(options)
    expected = generate_steps(torch.compile(model, backend=passes), model.config, steps=20)
    torch._dynamo.reset()
    model = model.cuda()
    run = torch.compile(model, backend="clsa", options={**options, "mode": mode})
    actual = generate_steps(run, model.config, steps=20, prime=model)
    assert largest_difference(expected, _on_cpu(actual)) < 1e-4
    assert counters["clsa"]["sparse_attention"] > 0


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_indexers_that_select_among_what_is_offered_equal_the_references(mode: str, passes: Any) -> None:
    """The oracle of test_sharing.py holds for the references."""
    options = {"share": "FSRSS", "pool": 12}
    model = tiny("glm_moe_dsa", num_hidden_layers=5, mlp_layer_types=["dense"] * 5)
    passes.options = Options.read(options)
    expected = generate_steps(torch.compile(model, backend=passes), model.config, steps=12)
    torch._dynamo.reset()
    model = model.cuda()
    run = torch.compile(model, backend="clsa", options={**options, "mode": mode})
    actual = generate_steps(run, model.config, steps=12, prime=model)
    assert largest_difference(expected, _on_cpu(actual)) < 1e-4


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_trained_indices_equal_the_references(
    kv_heads: int, cache: str, mode: str, passes: Any, index_plan: Any
) -> None:
    """The oracle of test_distilled.py holds for the references."""
    model = tiny("llama", num_hidden_layers=4)
    options = {"share": index_plan(model, kv_heads=kv_heads), "prefill": "sparse"}
    passes.options = Options.read(options)
    expected = generate_steps(torch.compile(model, backend=passes), model.config, cache=cache, steps=12)
    torch._dynamo.reset()
    model = model.cuda()
    run = torch.compile(model, backend="clsa", options={**options, "mode": mode})
    # A growing cache cannot be made beforehand: `reset` leaves what it holds.
    prime = model if cache == "static" else None
    actual = generate_steps(run, model.config, cache=cache, steps=12, prime=prime)
    assert largest_difference(expected, _on_cpu(actual)) < 1e-4
    assert counters["clsa"]["sparse_attention"] > 0


def _on_cpu(transcript: Transcript) -> Transcript:
    return Transcript([x.cpu() for x in transcript.logits], transcript.cache)


def test_no_contract_op_is_left_in_the_compiled_code() -> None:
    from torch._inductor.utils import run_and_get_code

    model = tiny("llama").cuda()
    run = torch.compile(model, backend="clsa")
    _, codes = run_and_get_code(lambda: generate_steps(run, model.config, steps=2))
    text = "\n".join(codes)
    assert "torch.ops.clsa" not in text
    assert "attention_decode" in text
