"""Decoders that benchmarks run, and the plans that they run under."""

from __future__ import annotations

import pytest
import torch
from shapes import build_model, index_plan, llama_config

import clsa_compile


@pytest.mark.parametrize(("groups", "key_heads"), [(1, None), (2, 1)])
def test_indices_of_random_weights_fit_the_model(groups: int, key_heads: int | None) -> None:
    config = llama_config(4, cache=128, tiny=True)
    model = build_model(config, torch.device("cpu"), torch.float32)
    plan = index_plan(config, groups, 8, key_heads)
    ids = torch.zeros(1, 40, dtype=torch.long)
    report = clsa_compile.inspect(
        model, input_ids=ids, use_cache=False, options={"share": plan, "prefill": "sparse"}
    )
    assert report.counts()["sparse_attention"] == 4
    assert report.counts()["index_topk"] == groups
