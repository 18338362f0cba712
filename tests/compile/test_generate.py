"""Through Hugging Face's `generate` with a static cache: the way most people decode."""

from __future__ import annotations

import torch
from torch._dynamo.utils import counters

from clsa_compile.testing import tiny


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
