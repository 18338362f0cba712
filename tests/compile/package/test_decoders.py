"""Decoders: which calls are one, what may vary, and which caches cannot be inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from clsa_compile.errors import ExportError
from clsa_compile.package.decoders import Decoder, is_decoder
from clsa_compile.testing import tiny

IDS = torch.zeros(2, 5, dtype=torch.long)


def test_what_is_a_decoder_on_tokens(llama: Any) -> None:
    assert is_decoder(llama, (IDS,), {})
    assert is_decoder(llama, (), {"input_ids": IDS})
    assert not is_decoder(llama, (IDS,), {"use_cache": False})
    assert not is_decoder(llama, (IDS.float(),), {})
    assert not is_decoder(llama, (), {"inputs_embeds": torch.zeros(1, 2, 64)})
    assert not is_decoder(llama.model, (IDS,), {}), "a model without a head generates nothing"
    assert not is_decoder(torch.nn.Linear(2, 2), (IDS,), {})


def test_caches_of_a_family_with_indexers() -> None:
    decoder = Decoder(tiny("deepseek_v32"), (IDS,), {}, None)
    caches = {entry.name: entry.sizes for entry in decoder.decoding().caches}
    assert caches["0.keys"] == ("B", 4, "T", 24)
    assert caches["1.values"] == ("B", 4, "T", 16)
    assert caches["1.indexer_keys"] == ("B", "T", 16)
    assert not decoder.decoding().is_padded
    # A graph with no more keys than are selected is another graph.
    (_, shapes, _) = decoder.traced("decode").dynamic_shapes
    assert {dim.min for dim in (shapes[0][2], shapes[2][1])} == {9}


def test_windows_get_caches_of_full_length() -> None:
    decoder = Decoder(tiny("gemma2", "eager"), (IDS,), {}, {"cache": 40, "batch": 2})
    shapes = [tuple(value.shape) for value in decoder.traced("prefill").args[1]]
    assert shapes == [(2, 2, 40, 16)] * 4


def test_sizes_that_are_fixed_do_not_vary(llama: Any) -> None:
    decoder = Decoder(llama, (IDS,), {"attention_mask": IDS}, {"batch": 1, "cache": 64, "prompt": (2, 32)})
    traced = decoder.traced("prefill")
    ids, caches, length, padding = traced.args
    assert (tuple(ids.shape), tuple(caches[0].shape), padding.shape) == ((1, 7), (1, 2, 64, 32), (1,))
    assert [set(entry) for entry in (traced.dynamic_shapes[0], traced.dynamic_shapes[1][0])] == [{1}, set()]
    assert traced.dynamic_shapes[0][1].max == 32
    assert length.shape == ()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"rows": 3}, "give a dict with 'batch', 'prompt' and 'cache'"),
        ([3], "give a dict with 'batch', 'prompt' and 'cache'"),
        ({"batch": 0}, r"dynamic_shapes\['batch'\] is 0"),
        ({"batch": True}, r"dynamic_shapes\['batch'\] is True"),
        ({"cache": (8, 4)}, r"dynamic_shapes\['cache'\] is \(8, 4\)"),
        ({"prompt": (1.0, 2)}, "a pair"),
    ],
)
def test_sizes_that_cannot_be(given: Any, reason: str, llama: Any) -> None:
    with pytest.raises(ExportError, match=reason):
        Decoder(llama, (IDS,), {}, given)


def test_arguments_that_programs_do_not_take(llama: Any) -> None:
    with pytest.raises(ExportError, match="not 'position_ids': its programs make positions by themselves"):
        Decoder(llama, (IDS,), {"position_ids": IDS}, None)


def test_layers_that_keep_something_else() -> None:
    model = tiny(
        "qwen3_next",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"],
    )
    with pytest.raises(ExportError, match=r"layer 0 of this qwen3_next keeps a .*, which is no static cache"):
        Decoder(model, (IDS,), {}, None)


def test_experts_multiply_another_way_while_programs_are_made() -> None:
    model = tiny("deepseek_v32")
    decoder = Decoder(model, (IDS,), {}, None)
    assert model.config._experts_implementation == "grouped_mm"
    with decoder.exportable():
        assert model.config._experts_implementation == "batched_mm"
    assert model.config._experts_implementation == "grouped_mm"
    model.to(torch.bfloat16)
    with decoder.exportable():
        assert model.config._experts_implementation == "grouped_mm", "there is an op for bfloat16"
