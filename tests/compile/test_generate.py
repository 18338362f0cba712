"""Through Hugging Face's `generate` with a static cache: the way most people decode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from clsa_compile.config import Options
from clsa_compile.testing import tiny

PROMPT, NEW, PADDING, TOLERANCE = 20, 8, 3, 1e-4


def padded() -> tuple[Tensor, Tensor]:
    """Returns tokens of two prompts and their mask; one begins with padding."""
    ids = torch.randint(1, 128, (2, PROMPT), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    return ids, mask


@torch.no_grad()
def steps(model: Any, forward: Any) -> Tensor:
    """Returns greedy logits [2, NEW, V]; the prompt runs by the model itself, as in `generate`."""
    from transformers import StaticCache

    given, mask = padded()
    cache = StaticCache(model.config, max_cache_len=PROMPT + NEW)
    found: list[Tensor] = []
    while len(found) < NEW:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -given.shape[1] :]
        run = forward if found else model
        logits = run(given, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        found.append(logits[:, -1].clone())
        given = found[-1].argmax(-1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(given)], dim=1)
    return torch.stack(found, dim=1)


@pytest.mark.slow
@pytest.mark.usefixtures("without_inductor")
def test_generate_attends_to_what_a_plan_of_trained_indices_selects(
    tmp_path: Path, passes: Any, index_plan: Any
) -> None:
    """`generate` makes masks, positions and caches by itself; steps of ours are given them by hand."""
    from transformers import CompileConfig

    model: Any = tiny("llama", num_hidden_layers=4)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    plan = index_plan(model)
    plan.save(tmp_path / "plan.json")
    passes.options = Options.read({"share": plan})
    expected = steps(model, torch.compile(model, backend=passes))
    torch._dynamo.reset()
    options = {"share": str(tmp_path / "plan.json"), "strict": True}
    config = CompileConfig(backend="clsa", mode=None, options=options)
    config._compile_all_devices = True
    ids, mask = padded()
    found = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        cache_implementation="static",
        compile_config=config,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert torch.equal(found.sequences[:, PROMPT:], expected.argmax(-1))
    torch.testing.assert_close(torch.stack(found.logits, dim=1), expected, atol=TOLERANCE, rtol=0)
    assert (counters["clsa"]["index_topk"], counters["clsa"]["sparse_attention"]) == (2, 4)
    assert (steps(model, model) - expected).abs().max() > TOLERANCE, "the plan changes results"


@pytest.mark.slow
def test_generate_with_a_compile_config_gives_the_eager_tokens() -> None:
    from transformers import CompileConfig

    torch._dynamo.reset()
    counters.clear()
    model = tiny("llama")
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    ids = torch.randint(1, 128, (2, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    settings = {
        "attention_mask": mask,
        "max_new_tokens": 8,
        "do_sample": False,
        "cache_implementation": "static",
    }
    expected = model.generate(ids, disable_compile=True, **settings)
    config = CompileConfig(backend="clsa", mode=None, options={"strict": True})
    config._compile_all_devices = True  # generate compiles on a CPU only when told so
    actual = model.generate(ids, compile_config=config, **settings)
    assert torch.equal(actual, expected)
    assert counters["clsa"]["attention"] == 2
    assert counters["clsa"]["left"] == 0
