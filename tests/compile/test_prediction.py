"""Predictions against what kernels are given, and against what was measured on an H100."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from transformers import AutoModelForCausalLM, GlmMoeDsaConfig, LlamaConfig, StaticCache

from clsa_compile import OptionError, inspect
from clsa_compile.backend import decided
from clsa_compile.capture.dynamo import capture
from clsa_compile.capture.launches import launch_of
from clsa_compile.config import Options
from clsa_compile.dispatch import kernels
from clsa_compile.errors import MissingTritonError
from clsa_compile.passes.pipeline import carry_out
from clsa_compile.prediction import Prediction, T, crossing, device_of, predict, rounded
from clsa_compile.testing import tiny

# The models of benchmarks/decode.py.
LLAMA = LlamaConfig(
    hidden_size=3072, intermediate_size=8192, num_attention_heads=24, num_key_value_heads=8, head_dim=128,
    vocab_size=128256, num_hidden_layers=28, max_position_embeddings=131072, tie_word_embeddings=True,
)  # fmt: skip
DSA = GlmMoeDsaConfig(
    hidden_size=2048, intermediate_size=6144, num_attention_heads=16, num_key_value_heads=16,
    qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, kv_lora_rank=512, q_lora_rank=1024,
    index_n_heads=32, index_head_dim=128, index_topk=2048, vocab_size=32768, num_hidden_layers=4,
    max_position_embeddings=131072, mlp_layer_types=["dense"] * 4, indexer_types=["full"] * 4,
)  # fmt: skip
SHARE = {"topk": 2048, "share": 4}


class Done(BaseException):
    """A graph was seen; nothing is to run."""


def step_of(model: Any, batch: int, cache: int, look: Any) -> None:
    """Hands a decode step's captured graph to `look`."""

    def backend(gm: Any, inputs: Any) -> Any:
        look(capture(gm, True))
        raise Done

    held = StaticCache(config=model.config, max_cache_len=cache)
    ids = torch.zeros(batch, 1, dtype=torch.long)
    with torch.no_grad():
        model(ids, past_key_values=held)
        torch._dynamo.reset()
        with pytest.raises(Done):
            torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(ids, past_key_values=held)


def predicted(config: Any, batch: int, options: Mapping[str, Any]) -> Prediction:
    found: list[Prediction | None] = []

    def look(captured: Any) -> None:
        decision = decided(captured, Options.read(options))
        found.append(predict(captured, decision, device_of("h100")))

    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        step_of(model, batch, 131072, look)
    assert found[0] is not None
    return found[0]


def given_bytes(graph: Any, cache: int, selected: int) -> int:
    """Counts the bytes of the tensors that launches get, but for what they leave alone.

    That is K and V of tokens that are not selected, room for candidates of a selection, and, where these
    are listed, the scores that they come from.
    """
    total = 0
    for launch in filter(None, map(launch_of, graph.nodes)):
        for name, value in launch.arguments.items():
            if not isinstance(value, Node) or not isinstance(value.meta["val"], torch.Tensor):
                continue
            size = value.meta["val"].nbytes
            if launch.name.startswith("sparse_attention") and name in ("k_ptr", "v_ptr"):
                size = size * selected // cache
            is_listed = launch.name.startswith("select_emit") and "list_ptr" in launch.arguments
            if name == "list_ptr" or (is_listed and name == "scores_ptr"):
                size = 0
            total += size
    return total


@pytest.mark.parametrize(
    ("name", "options", "selected"),
    [
        ("llama", {}, 0),
        ("llama", {"topk": 64, "share": 2}, 64),
        ("glm_moe_dsa", {}, 8),
        ("glm_moe_dsa", {"share": 2}, 8),
        ("gemma2", {}, 0),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_bytes_are_those_of_the_kernels_arguments(
    name: str, options: dict[str, Any], selected: int, batch: int
) -> None:
    cache = 16384
    model = tiny(name, max_position_embeddings=cache, sliding_window=cache).to(torch.bfloat16)
    pairs: list[tuple[float, int]] = []

    def look(captured: Any) -> None:
        decision = decided(captured, Options.read(options))
        found = predict(captured, decision, device_of("h100"))
        assert found is not None
        after = sum(cost.at(cache)[0] for _, cost in found.layers.values())
        lowered, _ = carry_out(captured, decision, kernels(), torch.library.wrap_triton)
        pairs.append((after, given_bytes(lowered.graph, cache, selected)))

    step_of(model, batch, cache, look)
    ((ours, theirs),) = pairs
    assert theirs > 100_000
    assert ours == pytest.approx(theirs, rel=0.05)


# README.md, "Measured": ms of a step at the end of a cache of 131072 tokens, by Inductor and by clsa.
@pytest.mark.parametrize(
    ("options", "inductor", "clsa"),
    [({}, 3.53, 0.67), ({"share": 4}, 3.53, 0.53)],
    ids=["exact", "share"],
)
def test_a_step_of_glm_moe_dsa_takes_what_was_measured(
    options: dict[str, Any], inductor: float, clsa: float
) -> None:
    found = predicted(DSA, 1, options)
    assert found.after.at(131000)[2] / 1e3 == pytest.approx(clsa, rel=0.1)
    assert found.before.at(131000)[2] / 1e3 == pytest.approx(inductor, rel=0.1)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("batch", "options", "inductor", "clsa"),
    [
        (1, {}, 49.14, 8.74),
        (1, SHARE, 49.14, 5.31),
        (4, {}, 180.6, 23.45),
        (4, SHARE, 180.6, 9.41),
    ],
    ids=["1-exact", "1-share", "4-exact", "4-share"],
)
def test_a_step_of_llama_takes_what_was_measured(
    batch: int, options: dict[str, Any], inductor: float, clsa: float
) -> None:
    found = predicted(LLAMA, batch, options)
    assert found.after.at(131000)[2] / 1e3 == pytest.approx(clsa, rel=0.1)
    assert found.before.at(131000)[2] / 1e3 == pytest.approx(inductor, rel=0.1)


def report_of(name: str, cache: int = 4096, **settings: Any) -> Any:
    model = tiny(name).to(torch.bfloat16)
    held = StaticCache(config=model.config, max_cache_len=cache)
    ids = torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        model(ids, past_key_values=held)
    return inspect(model, ids, past_key_values=held, **settings)


def test_dense_attention_is_counted_by_hand() -> None:
    (found,) = report_of("llama").predictions
    kv, row = 2 * 2 * 16 * 2, 2 * 4 * 16 * 2  # K and V of a token: 2 heads of 16; q and the output: 4 heads
    before, after = found.layers[0]
    assert sympy.expand(after.bytes - (kv * T + row)) == 0
    assert sympy.expand(before.bytes - (5 * kv * T + row)) == 0, "two copies of K and V, written and read"
    assert sympy.expand(after.flops - 2 * 4 * T * (16 + 16)) == 0
    weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)  # two layers
    head = 128 * 64
    assert found.after.bytes.subs(T, 0) == 2 * (weights + head) + 2 * 64 + 2 * row


def test_windows_read_no_more_than_they_hold() -> None:
    (found,) = report_of("gemma2").predictions
    window, whole = (found.layers[i][1] for i in (0, 1))
    assert window.at(100_000)[0] == window.at(16)[0]
    assert whole.at(100_000)[0] > 1000 * whole.at(16)[0] / 16
    assert window.at(8)[0] < window.at(16)[0]


def test_a_step_over_a_window_is_not_said_to_take_what_a_long_row_takes() -> None:
    (found,) = report_of("gemma2").predictions
    before, after = found.layers[0]
    assert after.at(100_000)[2] < 8, "two launches and 16 keys"
    assert after.at(100_000)[2] <= before.at(100_000)[2]


PROMPT = 64


def without_triton() -> Any:
    raise MissingTritonError


def prompt_of(name: str, slots: int, **changes: Any) -> Prediction:
    """Predicts a prompt of 64 tokens, in the last rows of a static cache."""
    model = tiny(name, max_position_embeddings=slots, **changes).to(torch.bfloat16)
    held = StaticCache(config=model.config, max_cache_len=slots)
    ids = torch.zeros(1, PROMPT, dtype=torch.long)
    (found,) = inspect(model, ids, past_key_values=held).predictions
    assert found.queries == PROMPT
    return found


@pytest.mark.parametrize("name", ["mistral", "llama"])
def test_a_prompt_whose_mask_is_a_formula_takes_what_the_kernel_that_skips_blocks_takes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = {"sliding_window": 32} if name == "mistral" else {}
    slots = PROMPT if name == "mistral" else 4096
    ours = prompt_of(name, slots, **window).layers[0][1]
    monkeypatch.setattr("clsa_compile.layers.kernels", without_triton)
    assert prompt_of(name, slots, **window).layers[0][1] == ours, "a device has Triton, wherever it is asked"
    asked: list[str] = []

    def other(op: str, *_: Any) -> str:
        asked.append(op)
        return "sdpa"

    monkeypatch.setattr("clsa_compile.prediction.variant_of", other)
    torchs = prompt_of(name, slots, **window).layers[0][1]
    assert set(asked) == {"attention"}
    flops = 2 * 4 * PROMPT * (16 + 16)
    if name == "mistral":
        assert ours.flops.subs(T, 10_000) == flops * 32, "a window"
    else:
        assert sympy.expand(ours.flops - flops * (T - sympy.Rational(63, 2))) == 0, "less a triangle"
    assert sympy.expand(torchs.flops - flops * T) == 0, "all keys, and a mask"
    assert torchs.bytes.subs(T, slots) - ours.bytes.subs(T, slots) == 2 * 2 * PROMPT * slots


def test_selected_tokens_cost_the_same_at_any_length_but_for_the_index() -> None:
    (found,) = report_of("glm_moe_dsa", options={"share": 2}).predictions
    first, second = (found.layers[i][1] for i in (0, 1))
    assert second.at(10_000)[0] == second.at(1_000_000)[0]
    assert first.at(1_000_000)[0] > 50 * first.at(10_000)[0]
    # The layer that has the index pays for both: the step as a whole gains somewhere between the two.
    assert found.break_evens[1] == 9
    assert 9 < found.break_even < found.break_evens[0]


def test_idle_indexers_do_not_read_their_weights() -> None:
    (own,) = report_of("glm_moe_dsa").predictions
    (shared,) = report_of("glm_moe_dsa", options={"share": 2}).predictions
    assert own.before == shared.before
    gone = own.after.bytes.subs(T, 0) - shared.after.bytes.subs(T, 0)
    # wq_b and the heads' weights of one indexer, in bfloat16, and its queries. Its keys are still written.
    assert gone == 2 * (32 * 32 * 16 + 64 * 32) + 32 * (16 * 2 + 4)


def test_dense_layers_have_no_break_even() -> None:
    (found,) = report_of("llama").predictions
    assert found.break_even is None
    assert found.break_evens == {}


@pytest.mark.parametrize(
    ("dense", "sparse", "topk", "at"),
    [
        (T, sympy.Integer(1000), 64, 1001),
        (2 * T + 5, T + 100, 64, 96),
        (2 * T, sympy.Integer(1), 64, 65),
        (T, T + 1, 64, None),
        (sympy.Min(T, 512), sympy.Integer(600), 64, None),
    ],
)
def test_the_crossing_of_two_lines(dense: Any, sparse: Any, topk: int, at: int | None) -> None:
    assert crossing(dense, sparse, topk) == at


def test_numbers_become_json_and_formulas_can_be_read_back() -> None:
    report = report_of("glm_moe_dsa")
    (graph,) = json.loads(json.dumps(report.to_dict()))["graphs"]
    data = graph["prediction"]
    assert [entry["tokens"] for entry in data["at"]] == [4096, 131072]
    formula = sympy.sympify(data["after"]["bytes"], locals={"T": T})
    assert formula.subs(T, 131072) == data["at"][1]["after"]["bytes"]
    assert [layer["ordinal"] for layer in data["layers"]] == [0, 1]


def test_lengths_and_devices() -> None:
    report = report_of("llama", lengths=(64, 8, 64), device="a100")
    assert report.lengths == (8, 64)
    assert report.predictions[0].device.startswith("NVIDIA A100")
    assert [e["tokens"] for e in report.at(7).to_dict()["graphs"][0]["prediction"]["at"]] == [7]
    faster = report_of("llama", device="h200").predictions[0]
    assert faster.after.at(131072)[2] < report.predictions[0].after.at(131072)[2]
    for wrong in ((), (0,), (-4,), (True,), ("8",)):
        with pytest.raises(OptionError, match="lengths"):
            report_of("llama", lengths=wrong)
    with pytest.raises(OptionError, match="lengths"):
        report.at(0)
    with pytest.raises(OptionError, match="no device is called"):
        report_of("llama", device="abacus")


def test_prompts_show_no_length_that_is_shorter_than_they_are() -> None:
    model = tiny("llama").to(torch.bfloat16)
    (found,) = inspect(model, torch.zeros(1, 12, dtype=torch.long), use_cache=False).predictions
    assert found.queries == 12
    assert found.sensible((4, 12, 64)) == (12, 64)
    assert found.sensible((4,)) == (12,)


def test_a_prompt_without_a_cache_sees_half_of_its_tokens() -> None:
    model = tiny("llama").to(torch.bfloat16)
    (found,) = inspect(model, torch.zeros(1, 12, dtype=torch.long), use_cache=False).predictions
    before, after = found.layers[0]
    assert after.flops.subs(T, 12) == 2 * 4 * 12 * sympy.Rational(13, 2) * 32
    assert before.flops.subs(T, 12) == 2 * 4 * 12 * 12 * 32


@pytest.mark.parametrize(
    ("name", "options", "works"),
    [
        ("llama", {"topk": 40, "share": 2}, ("dense attention", "attention mass", "selection")),
        ("glm_moe_dsa", {}, ("sparse attention", "index scan", "selection")),
    ],
)
def test_operations_are_what_layers_are_the_sum_of(name: str, options: Any, works: tuple[str, ...]) -> None:
    (found,) = report_of(name, options=options, device="h100").predictions
    for place, operations in enumerate(found.operations):
        for ordinal, costs in found.layers.items():
            own = [o.cost.at(131072) for o in operations if ordinal in o.ordinals]
            parts = tuple(map(sum, zip(*own, strict=True)))
            assert parts == pytest.approx(costs[place].at(131072))
    assert [o.name for o in found.operations[1] if 0 in o.ordinals] == list(works)
    assert (found.bandwidth, found.rate) == (3.35e12, 9.89e14)


def test_broken_numbers_have_four_digits() -> None:
    text = sympy.sstr(rounded(0.123456 * T + 7), full_prec=False)
    assert text == "0.1235*T + 7"
