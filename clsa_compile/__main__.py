"""`clsa` on the command line; `python -m clsa_compile` is the same."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from clsa_compile.commands import COMMANDS, add_sharing, check_files, sharing_of
from clsa_compile.configurations import GRAPHS, Inspected, inspect_configuration
from clsa_compile.errors import ClsaError
from clsa_compile.prediction import LENGTHS


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0 when it worked, 2 for what cannot be, said in one line."""
    parser = argparse.ArgumentParser(
        prog="clsa", description="Cross-layer sparse attention for torch.compile."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_inspect(commands)
    for add in COMMANDS:
        add(commands)
    arguments = parser.parse_args(argv)
    try:
        check_files(arguments)
        return int(arguments.run(arguments))
    except ClsaError as error:
        reason = str(error)
    except OSError as error:  # a full disk, a file that cannot be read: the machine's, not ours
        reason = str(error).partition("\n")[0] or type(error).__name__
    print(f"clsa: {reason}", file=sys.stderr)
    return 2


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect", help="what clsa would do with a Hugging Face model, and its cost; no weights needed"
    )
    given = parser.add_mutually_exclusive_group(required=True)
    config = "a configuration file (config.json), or the folder it is in"
    given.add_argument("path", type=Path, nargs="?", metavar="config", help=config)
    given.add_argument("--config", type=Path, help="the same")
    parser.add_argument("--graph", choices=(*GRAPHS, "both"), default="both", help="default: both")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the prompt (default 2048)")
    parser.add_argument("--batch", type=int, default=1, help="sequences (default 1)")
    parser.add_argument("--cache", type=int, help="tokens that the static cache holds (the longest of --at)")
    parser.add_argument(
        "--at", type=_lengths, default=LENGTHS, help="tokens in the cache to show numbers for: 4096,131072"
    )
    parser.add_argument("--device", help="h100, h200, b200 or a100 (default: what is at hand, else h100)")
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa")
    parser.add_argument("--json", action="store_true", help="print the reports as JSON")
    parser.add_argument("--html", type=Path, help="the reports as a page (.html) that needs no network")
    add_sharing(parser)
    parser.set_defaults(run=_run_inspect)


def _lengths(text: str) -> tuple[int, ...]:
    found = tuple(int(part) for part in text.split(","))
    if not all(length > 0 for length in found):
        raise ValueError(text)
    return found


def _run_inspect(arguments: argparse.Namespace) -> int:
    found = inspect_configuration(
        arguments.config or arguments.path,
        prompt=arguments.prompt,
        cache=arguments.cache,
        batch=arguments.batch,
        attention=arguments.attention,
        graphs=GRAPHS if arguments.graph == "both" else (arguments.graph,),
        options=sharing_of(arguments),
        lengths=arguments.at,
        device=arguments.device,
    )
    # All is known, and the page is there, before the first line is written.
    if arguments.html is not None:
        found.to_html(arguments.html)
    if arguments.json:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        _show(found)
    return 0


def _show(found: Inspected) -> None:
    """Prints reports, as wide as the terminal, plain where they are piped."""
    console = Console() if sys.stdout.isatty() else None
    title = f"{found.model_type}, {found.parameters:.3g} parameters"
    for name, report in found.reports.items():
        print(f"== {name}: {title} ==")
        if console is None:
            print(report)
        else:
            console.print(report)


if __name__ == "__main__":
    sys.exit(main())
