"""`clsa search` and `clsa evaluate`: a Hugging Face model and text files in, a plan or a report out."""

from __future__ import annotations

import argparse
import copy
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clsa_compile.errors import OptionError
from clsa_compile.ir.sharing import SharingPlan

__all__ = ["COMMANDS", "Loaded", "load", "windows"]

# Tokens of a sequence, where the model takes as many.
LENGTH = 2048
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to run, and what turns text into its tokens."""

    model: Any
    tokenizer: Any


def add_search(commands: Any) -> None:
    """Adds `clsa search`."""
    parser = commands.add_parser("search", help="find which layers of a dense model may share tokens")
    _add_common(parser)
    parser.add_argument("--topk", type=int, required=True, help="tokens that layers attend to, 1 to 4096")
    parser.add_argument("--anchors", type=int, help="layers that attend to all tokens and choose")
    parser.add_argument("--budget", type=float, help="increase of perplexity to stay within; 0.01 is 1%%")
    parser.add_argument("--scope", default="layer", help="'layer' (default) or 'kv_head'")
    parser.add_argument("--keep-first", type=int, default=4, help="first tokens that are always selected")
    parser.add_argument("--keep-last", type=int, default=32, help="last tokens that are always selected")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="the plan's file (.json)")
    parser.set_defaults(run=run_search)


def add_evaluate(commands: Any) -> None:
    """Adds `clsa evaluate`."""
    parser = commands.add_parser("evaluate", help="measure what a plan costs a model on some text")
    _add_common(parser)
    parser.add_argument("--plan", type=Path, help="a plan that `clsa search` wrote")
    parser.add_argument("--share", help="instead of a plan: a number or a schedule of F and S, with --topk")
    parser.add_argument("--topk", type=int, help="tokens that layers attend to, with --share")
    parser.set_defaults(run=run_evaluate)


COMMANDS = (add_search, add_evaluate)


def run_search(arguments: argparse.Namespace) -> int:
    """Searches, writes the plan and prints what it costs."""
    from clsa_compile.calibration.searching import Asked, find

    if arguments.out.suffix != ".json":
        raise OptionError(f"--out is {os.fspath(arguments.out)!r}; a plan's file ends in .json")
    names = ("topk", "budget", "anchors", "scope", "keep_first", "keep_last", "seed")
    asked = Asked(**{name: getattr(arguments, name) for name in names})
    asked.options()  # what cannot be is said before a model is loaded
    loaded = load(arguments.model, arguments.device, arguments.dtype)
    sequences = windows(loaded, arguments.text, arguments.length, arguments.sequences)
    found = find(loaded.model, sequences, asked, arguments.folder, not arguments.quiet)
    found.plan.save(arguments.out)
    _report(arguments, loaded, found.quality)
    return 0


def run_evaluate(arguments: argparse.Namespace) -> int:
    """Measures a plan, or a schedule, and prints what it costs."""
    from clsa_compile.calibration.judging import evaluate

    if (arguments.plan is None) == (arguments.share is None):
        raise OptionError("give --plan, or --share with --topk")
    plan: Any = arguments.plan
    if plan is not None:
        plan = SharingPlan.load(plan)
    else:
        share = arguments.share
        plan = {"topk": arguments.topk, "share": int(share) if share.isdigit() else share}
    loaded = load(arguments.model, arguments.device, arguments.dtype)
    sequences = windows(loaded, arguments.text, arguments.length, arguments.sequences)
    quality = evaluate(loaded.model, plan, sequences, folder=arguments.folder, progress=not arguments.quiet)
    _report(arguments, loaded, quality)
    return 0


def load(path: Path, device: str, dtype: str) -> Loaded:
    """Loads a Hugging Face folder or a GGUF file. Raises OptionError for what is neither."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise OptionError("loading a model needs transformers: pip install clsa[hf]") from error
    folder, settings = path, {}
    if path.suffix == ".gguf":
        folder, settings = path.parent, {"gguf_file": path.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **settings)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], local_files_only=True, **settings
        )
        return Loaded((_plain(model) if settings else model).to(device).eval(), tokenizer)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise OptionError(f"cannot load a model from {os.fspath(path)!r}: {reason}") from error


def windows(loaded: Loaded, files: Sequence[Path], length: int | None, most: int | None) -> list[Tensor]:
    """Returns sequences [1, length] of texts, one of each file in turn, so that every part has all kinds.

    Raises OptionError for a file that cannot be read, and where none is long enough.
    """
    longest = getattr(loaded.model.config, "max_position_embeddings", LENGTH)
    length = min(LENGTH, longest) if length is None else length
    by_file = [list(_cut(loaded.tokenizer, path, length)) for path in files]
    found = [ids for ids in chain.from_iterable(zip_longest(*by_file)) if ids is not None][:most]
    if not found:
        raise OptionError(f"no text is as long as {length} tokens; give more text, or a smaller --length")
    return found


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="a Hugging Face folder, or a GGUF file")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="text files, of several kinds")
    parser.add_argument(
        "--length", type=int, help=f"tokens of a sequence (default {LENGTH}, or the model's most)"
    )
    parser.add_argument("--sequences", type=int, help="no more sequences than this")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--folder", type=Path, help="keeps finished stages, to go on after an interruption")
    parser.add_argument("--heatmap", type=Path, help="a picture (.png) of who could choose for whom")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def _report(arguments: argparse.Namespace, loaded: Loaded, quality: Any) -> None:
    quality = quality.with_text(loaded.tokenizer.decode([quality.worst_token.token]))
    if arguments.heatmap is not None:
        quality.heatmap(arguments.heatmap)
    print(json.dumps(quality.to_dict(), indent=1) if arguments.json else quality)


def _plain(loaded: Any) -> Any:
    """Returns a model that was read from a GGUF file as one that no longer calls itself quantised."""
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(loaded)(config).to(loaded.dtype)
    plain.load_state_dict(loaded.state_dict())
    return plain


def _cut(tokenizer: Any, path: Path, length: int) -> Iterator[Tensor]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise OptionError(f"the text {os.fspath(path)!r} cannot be read: {error}") from error
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
    for start in range(0, len(ids) - length + 1, length):
        yield ids[None, start : start + length]
