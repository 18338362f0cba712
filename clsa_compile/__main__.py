"""`clsa` on the command line; `python -m clsa_compile` is the same."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from clsa_compile.commands import COMMANDS
from clsa_compile.errors import ClsaError, OptionError
from clsa_compile.inspection import Report, inspect


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0 when it worked, 2 for what cannot be, said in one line."""
    parser = argparse.ArgumentParser(
        prog="clsa", description="Cross-layer sparse attention for torch.compile."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    look = commands.add_parser(
        "inspect", help="what clsa would do with a Hugging Face model; no weights needed"
    )
    look.add_argument("config", type=Path, help="a configuration file (config.json), or the folder it is in")
    look.add_argument(
        "--tokens", type=int, default=1, help="tokens of the step; 1 is a decode step (default)"
    )
    look.add_argument("--cache", type=int, default=4096, help="tokens that the static cache holds")
    look.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa")
    look.add_argument("--json", action="store_true", help="print the report as JSON")
    look.set_defaults(run=_run_inspect)
    for add in COMMANDS:
        add(commands)
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except ClsaError as error:
        print(f"clsa: {error}", file=sys.stderr)
        return 2


def _run_inspect(arguments: argparse.Namespace) -> int:
    report = _inspect(arguments.config, arguments.attention, arguments.tokens, arguments.cache)
    print(json.dumps(report.to_dict(), indent=1) if arguments.json else report)
    return 0


def _inspect(config: Path, attention: str, tokens: int, cache: int) -> Report:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, StaticCache
    except ImportError as error:
        raise OptionError("inspecting a configuration needs transformers: pip install clsa[hf]") from error
    try:
        settings = AutoConfig.from_pretrained(config if config.is_dir() else config.parent)
        settings._attn_implementation = attention
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings).eval()
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot make a model from {config}: {str(error).splitlines()[0]}") from error
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    return inspect(model, ids, past_key_values=StaticCache(config=settings, max_cache_len=cache))


if __name__ == "__main__":
    sys.exit(main())
