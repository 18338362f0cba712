"""`clsa search`, `distill`, `evaluate`, `tasks`, `export`: a model in; a plan, a report or a package out."""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from clsa_compile.config import Options
from clsa_compile.errors import OptionError, PlanError
from clsa_compile.ir import files
from clsa_compile.ir.sharing import SharingPlan

__all__ = [
    "COMMANDS",
    "Loaded",
    "add_sharing",
    "check_files",
    "load",
    "load_model",
    "sharing_of",
    "windows",
]

# Tokens of a sequence, where the model takes as many.
LENGTH = 2048
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Options of the backend that say what layers share, where no plan does.
SHARING = ("share", "topk", "pool", "scope", "keep_first", "keep_last", "dense_below")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to run, and what turns text into its tokens."""

    model: Any
    tokenizer: Any


def add_search(commands: Any) -> None:
    """Adds `clsa search`."""
    parser = commands.add_parser("search", help="find which layers of a dense model may share tokens")
    _add_model(parser)
    _add_text(parser)
    parser.add_argument("--topk", type=int, help="tokens that layers of a dense model attend to, 1 to 4096")
    parser.add_argument(
        "--anchors", type=int, help="layers that choose; in a dense model they attend to all tokens"
    )
    parser.add_argument("--budget", type=float, help="increase of perplexity to stay within; 0.01 is 1%%")
    parser.add_argument("--scope", default="layer", help="'layer' (default) or 'kv_head'")
    parser.add_argument("--keep-first", type=int, default=4, help="first tokens that are always selected")
    parser.add_argument("--keep-last", type=int, default=32, help="last tokens that are always selected")
    parser.add_argument("--seed", type=int, default=0)
    _add_out(parser)
    parser.set_defaults(run=run_search)


def add_distill(commands: Any) -> None:
    """Adds `clsa distill`."""
    parser = commands.add_parser(
        "distill", help="train a small index for groups of a dense model's layers, or a model's own indexers"
    )
    _add_model(parser)
    _add_text(parser)
    parser.add_argument("--topk", type=int, help="tokens that layers of a dense model attend to, 1 to 4096")
    parser.add_argument(
        "--groups", type=int, nargs="+", help="how many indices, or the layers their groups begin at: 0 8 15"
    )
    parser.add_argument("--budget", type=float, help="increase of perplexity to stay within; 0.01 is 1%%")
    parser.add_argument("--steps", type=int, default=2000, help="a sequence each (default 2000)")
    parser.add_argument("--score", default="mixture", help="'mixture' (default) or 'lightning'")
    parser.add_argument("--target", default="worth", help="'worth' (default) or 'attention'")
    parser.add_argument("--kv-heads", type=int, help="key heads that an index reads (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    _add_out(parser)
    parser.set_defaults(run=run_distill)


def add_evaluate(commands: Any) -> None:
    """Adds `clsa evaluate`."""
    parser = commands.add_parser("evaluate", help="measure what a plan costs a model on some text")
    _add_model(parser)
    _add_text(parser)
    _add_plan(parser)
    parser.add_argument("--tasks", action="store_true", help="measure the synthetic tasks too, at --length")
    parser.set_defaults(run=run_evaluate)


def add_tasks(commands: Any) -> None:
    """Adds `clsa tasks`."""
    parser = commands.add_parser("tasks", help="measure what a plan costs a model on synthetic tasks")
    _add_model(parser)
    _add_plan(parser)
    parser.add_argument("--tasks", nargs="+", help="these tasks only (default: all five)")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of a prompt (default: 1024 2048)")
    parser.add_argument("--depths", type=float, nargs="+", help="0 to 1 (default: 0 0.25 0.5 0.75 1)")
    parser.add_argument("--samples", type=int, help="samples of each task, length and depth (default: 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--filler", type=Path, help="a text file to hide things in")
    parser.set_defaults(run=run_tasks)


def add_export(commands: Any) -> None:
    """Adds `clsa export`."""
    parser = commands.add_parser("export", help="compile a decoder ahead of time, into one file")
    parser.add_argument("model", type=Path, help="a Hugging Face folder, or a GGUF file")
    parser.add_argument("--out", type=Path, required=True, help="the package's file (.pt2)")
    parser.add_argument("--format", choices=("pt2", "program", "mlir"), default="pt2")
    parser.add_argument("--weights", choices=("inside", "outside"), default="inside")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--padding", action="store_true", help="prompts may begin with padding")
    parser.add_argument("--plan", type=Path, help="a plan that `clsa search` or `clsa distill` wrote")
    add_sharing(parser)
    for name, what in (
        ("batch", "sequences"),
        ("prompt", "tokens of a prompt"),
        ("cache", "slots of a cache"),
    ):
        parser.add_argument(f"--{name}", type=_size, help=f"{what}: a number, or a range such as 1:64")
    parser.add_argument("--json", action="store_true", help="print size, digest and seconds as JSON")
    parser.set_defaults(run=run_export)


COMMANDS = (add_search, add_distill, add_evaluate, add_tasks, add_export)


def run_export(arguments: argparse.Namespace) -> int:
    """Writes a package and prints its digest."""
    from clsa_compile.package.building import export, options_of, target_of

    options = sharing_of(arguments)
    # What cannot be is said before a model is loaded.
    target_of(arguments.out, arguments.format, arguments.weights)
    options_of(options, arguments.plan)
    sizes = {name: getattr(arguments, name) for name in ("batch", "prompt", "cache")}
    model, _, _ = load_model(arguments.model, arguments.device, arguments.dtype)
    ids = torch.zeros(1, 2, dtype=torch.long, device=arguments.device)
    made = export(
        model,
        (ids,),
        {"attention_mask": torch.ones_like(ids)} if arguments.padding else None,
        path=arguments.out,
        options=options,
        dynamic_shapes={name: size for name, size in sizes.items() if size is not None} or None,
        plan=arguments.plan,
        format=arguments.format,
        weights=arguments.weights,
    )
    if arguments.json:
        facts = {"digest": made.digest, "bytes": made.size, "seconds": dict(made.seconds)}
        print(json.dumps({"path": os.fspath(made.path), **facts}, indent=1))
    else:
        print(f"{made.report}\n{made}")
    return 0


def _size(text: str) -> int | tuple[int, int]:
    least, colon, most = text.partition(":")
    return (int(least), int(most)) if colon else int(least)


def check_files(arguments: argparse.Namespace) -> None:
    """Raises OptionError for a file that could not be written, before any work is done for it."""
    for name in ("out", "html", "heatmap"):
        path = getattr(arguments, name, None)
        if path is None or getattr(arguments, "format", "") == "mlir":  # that is a folder
            continue
        try:
            files.check(path)
        except OSError as error:
            raise OptionError(f"--{name}: nothing can be written to {os.fspath(path)!r}: {error}") from error


def run_search(arguments: argparse.Namespace) -> int:
    """Searches, writes the plan and prints what it costs."""
    from clsa_compile.calibration.searching import Asked, find

    _check_out(arguments.out)
    names = ("topk", "budget", "anchors", "scope", "keep_first", "keep_last", "seed")
    asked = Asked(**{name: getattr(arguments, name) for name in names})
    asked.options()  # what cannot be is said before a model is loaded
    return _write_plan(arguments, find, asked)


def run_distill(arguments: argparse.Namespace) -> int:
    """Trains indices, writes the plan and its weights, and prints what it costs."""
    from clsa_compile.calibration.distilling import Wanted, train

    _check_out(arguments.out)
    groups = None if arguments.groups is None else tuple(arguments.groups)
    groups = groups[0] if groups is not None and len(groups) == 1 else groups
    names = ("topk", "budget", "steps", "score", "target", "kv_heads", "seed")
    wanted = Wanted(groups=groups, **{name: getattr(arguments, name) for name in names})
    return _write_plan(arguments, train, wanted)


def _write_plan(arguments: argparse.Namespace, make: Callable[..., Any], asked: Any) -> int:
    """Makes what was asked for of a model and texts, writes the plan and reports its quality."""
    loaded = load(arguments.model, arguments.device, arguments.dtype)
    sequences = windows(loaded, arguments.text, arguments.length, arguments.sequences)
    folder = _folder(arguments)
    if folder is not None:
        _say(arguments, f"stages are kept in {folder}: the same command goes on after an interruption")
    found = make(loaded.model, sequences, asked, folder, not arguments.quiet)
    _save(found.plan, arguments.out, folder)
    _report(arguments, loaded, found.quality)
    if folder is not None:
        _say(arguments, f"the plan is in {arguments.out}; {folder} may be deleted")
    return 0


def _folder(arguments: argparse.Namespace) -> Path | None:
    """Returns where stages are kept: beside the plan unless another folder, or none, was asked for."""
    if arguments.no_folder:
        return None
    return arguments.folder or arguments.out.with_suffix(".stages")


def _save(plan: SharingPlan, out: Path, folder: Path | None) -> None:
    """Writes a plan. Raises PlanError that says how hours of work are not lost where that cannot be."""
    try:
        plan.save(out)
    except PlanError as error:
        again = "what was found is lost, since --no-folder was given"
        if folder is not None:
            again = (
                f"the same command with another --out and --folder {os.fspath(folder)!r} goes on from what "
                "that folder has kept"
            )
        raise PlanError(f"{error}; {again}") from error


def _say(arguments: argparse.Namespace, line: str) -> None:
    """Prints a line about what goes on beside the progress: standard output is for the report."""
    if not arguments.quiet:
        print(f"clsa: {line}", file=sys.stderr)


def _check_out(path: Path) -> None:
    if path.suffix != ".json":
        raise OptionError(f"--out is {os.fspath(path)!r}; a plan's file ends in .json")


def run_evaluate(arguments: argparse.Namespace) -> int:
    """Measures a plan, or a schedule, and prints what it costs."""
    from clsa_compile.calibration.judging import evaluate
    from clsa_compile.calibration.tasks import evaluate_tasks

    plan = _plan_of(arguments)
    loaded = load(arguments.model, arguments.device, arguments.dtype)
    sequences = windows(loaded, arguments.text, arguments.length, arguments.sequences)
    settings = {"folder": arguments.folder, "progress": not arguments.quiet}
    quality = evaluate(loaded.model, plan, sequences, **settings)
    tasks = None
    if arguments.tasks:
        length = sequences[0].shape[1]
        tasks = evaluate_tasks(loaded.model, plan, loaded.tokenizer, lengths=length, **settings)
    _report(arguments, loaded, quality, tasks)
    return 0


def run_tasks(arguments: argparse.Namespace) -> int:
    """Measures a plan, or a schedule, on synthetic tasks and prints what it costs."""
    from clsa_compile.calibration.tasks import evaluate_tasks

    plan = _plan_of(arguments)
    names = ("tasks", "lengths", "depths", "samples", "seed", "folder")
    settings = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if arguments.filler is not None:
        settings["filler"] = _read(arguments.filler)
    loaded = load(arguments.model, arguments.device, arguments.dtype)
    report = evaluate_tasks(loaded.model, plan, loaded.tokenizer, progress=not arguments.quiet, **settings)
    if arguments.html is not None:
        report.to_html(arguments.html)
    if arguments.json:
        print(json.dumps(report.to_dict(), indent=1))
    else:
        _show(report)
    return 0


def load(path: Path, device: str, dtype: str) -> Loaded:
    """Loads a Hugging Face folder or a GGUF file, with its tokenizer. Raises OptionError."""
    model, folder, settings = load_model(path, device, dtype)
    from transformers import AutoTokenizer

    try:
        return Loaded(model, AutoTokenizer.from_pretrained(folder, local_files_only=True, **settings))
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise _unloadable(path, error) from error


def load_model(path: Path, device: str, dtype: str) -> tuple[Any, Path, dict[str, str]]:
    """Loads a model alone; returns it with what finds its tokenizer. Raises OptionError."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise OptionError("loading a model needs transformers: pip install clsa[hf]") from error
    folder, settings = path, {}
    if path.suffix == ".gguf":
        folder, settings = path.parent, {"gguf_file": path.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], local_files_only=True, **settings
        )
        return (_plain(model) if settings else model).to(device).eval(), folder, settings
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise _unloadable(path, error) from error


def _unloadable(path: Path, error: Exception) -> OptionError:
    reason = str(error).partition("\n")[0]
    return OptionError(f"cannot load a model from {os.fspath(path)!r}: {reason}")


def windows(loaded: Loaded, files: Sequence[Path], length: int | None, most: int | None) -> list[Tensor]:
    """Returns sequences [1, length] of texts, each file's evenly spread, so that every part has all kinds.

    Where there are more than `most`, files give one each in turn until there are as many. Raises OptionError
    for a file that cannot be read, and where none is long enough.
    """
    longest = getattr(loaded.model.config, "max_position_embeddings", LENGTH)
    length = min(LENGTH, longest) if length is None else length
    by_file = [list(_cut(loaded.tokenizer, path, length)) for path in files]
    taken = sorted((number, file) for file, cut in enumerate(by_file) for number in range(len(cut)))[:most]
    if not taken:
        raise OptionError(f"no text is as long as {length} tokens; give more text, or a smaller --length")
    counts = Counter(file for _, file in taken)
    taken.sort(key=lambda window: ((window[0] + 0.5) / counts[window[1]], window[1]))
    return [by_file[file][number] for number, file in taken]


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="a Hugging Face folder, or a GGUF file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--html", type=Path, help="the report as a page (.html) that needs no network")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def _add_text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="text files, of several kinds")
    parser.add_argument(
        "--length", type=int, help=f"tokens of a sequence (default {LENGTH}, or the model's most)"
    )
    parser.add_argument("--sequences", type=int, help="no more sequences than this")
    parser.add_argument("--heatmap", type=Path, help="a picture (.png) of who could choose for whom")


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="the plan's file (.json)")
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument(
        "--folder",
        type=Path,
        help="keeps finished stages, to go on after an interruption (default: plan.stages beside plan.json)",
    )
    kept.add_argument("--no-folder", action="store_true", help="keep no stages")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plan", type=Path, help="a plan that `clsa search` or `clsa distill` wrote")
    parser.add_argument("--folder", type=Path, help="keeps what was measured, to find it there again")
    add_sharing(parser)


def add_sharing(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the backend that say what layers share, where no plan does."""
    group = parser.add_argument_group("sharing", "The backend's options of these names.")
    group.add_argument("--share", help="a number n (every n-th layer chooses), a schedule or a plan's file")
    group.add_argument("--topk", type=int, help="tokens that layers of a dense model attend to, 1 to 4096")
    group.add_argument("--pool", type=int, help="tokens that an R chooses among (default: 4 times as many)")
    group.add_argument("--scope", help="'layer' (default) or 'kv_head'")
    group.add_argument("--keep-first", type=int, help="first tokens that are always selected (default 4)")
    group.add_argument("--keep-last", type=int, help="last tokens that are always selected (default 32)")
    group.add_argument("--dense-below", type=int, help="readable tokens up to which layers stay dense")


def sharing_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the backend's options that `add_sharing` added, as far as they were given."""
    given = {name: value for name in SHARING if (value := getattr(arguments, name)) is not None}
    share = given.get("share", "")
    return {**given, "share": int(share)} if share.isdigit() else given


def _plan_of(arguments: argparse.Namespace) -> Any:
    """Returns the plan, or the options, that are to be measured. Raises OptionError for what cannot be."""
    if (arguments.plan is None) == (arguments.share is None):
        raise OptionError("give --plan, or --share with --topk")
    options = sharing_of(arguments)
    if arguments.plan is not None:
        plan = SharingPlan.load(arguments.plan)
        if not options:
            return plan
        options["share"] = plan
    Options.read(options)  # what cannot be is said before a model is loaded
    return options


def _report(arguments: argparse.Namespace, loaded: Loaded, quality: Any, tasks: Any = None) -> None:
    quality = quality.with_text(loaded.tokenizer.decode([quality.worst_token.token]))
    if arguments.heatmap is not None:
        quality.heatmap(arguments.heatmap)
    if arguments.html is not None:
        quality.to_html(arguments.html, tasks)
    if arguments.json:
        more = {} if tasks is None else {"tasks": tasks.to_dict()}
        print(json.dumps({**quality.to_dict(), **more}, indent=1))
        return
    print(quality)
    if tasks is not None:
        _show(tasks)


def _show(tasks: Any) -> None:
    """Prints a report of tasks, with lines and weights on a terminal, plain where it is piped."""
    if sys.stdout.isatty():
        Console().print(tasks)
    else:
        print(tasks)


def _plain(loaded: Any) -> Any:
    """Returns a model that was read from a GGUF file as one that no longer calls itself quantised."""
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(loaded)(config).to(loaded.dtype)
    plain.load_state_dict(loaded.state_dict())
    return plain


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise OptionError(f"the text {os.fspath(path)!r} cannot be read: {error}") from error


def _cut(tokenizer: Any, path: Path, length: int) -> Iterator[Tensor]:
    ids = torch.tensor(tokenizer(_read(path), verbose=False)["input_ids"], dtype=torch.long)
    for start in range(0, len(ids) - length + 1, length):
        yield ids[None, start : start + length]
