"""Template, score and predicate -> the text of one Triton kernel -> a module imported from a file.

The text stands alone (it imports triton and nothing else) and can be read, diffed and compiled by
itself. Files are named by the hash of their text, so a file is never stale and never changes.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from clsa_compile.errors import KernelError
from clsa_compile.ir.files import write_text
from clsa_compile.ir.masks import parse_predicate, predicate_to_triton
from clsa_compile.ir.scores import parse_score, pointwise_to_triton

TEMPLATES = importlib.resources.files("clsa_compile.kernels") / "templates"

_MODULES: dict[str, Any] = {}


def default_folder() -> Path:
    """Returns where rendered kernels are kept: $XDG_CACHE_HOME/clsa/kernels or ~/.cache/clsa/kernels."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "clsa" / "kernels"


@functools.cache
def _environment() -> jinja2.Environment:
    def source(name: str) -> str:
        return (TEMPLATES / name).read_text(encoding="utf-8")

    return jinja2.Environment(
        loader=jinja2.FunctionLoader(source),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        bytecode_cache=_compiled_templates(),
    )


def _compiled_templates() -> jinja2.BytecodeCache | None:
    """Keeps compiled templates beside the kernels: to compile them takes longer than to load a kernel."""
    folder = default_folder().with_name("templates")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None  # `write` will say which folder cannot be written
    return jinja2.FileSystemBytecodeCache(str(folder)) if os.access(folder, os.W_OK) else None


def load_text(slot: int, args: list[str]) -> str:
    """Returns the Triton text that reads mask input `slot` at the index texts `args`."""
    terms = [f"tl.cast({arg}, tl.int64) * in{slot}_s{axis}" for axis, arg in enumerate(args)]
    return f"tl.load({' + '.join([f'in{slot}', *terms])})"


def predicate_text(predicate: str) -> str:
    """Returns the Triton text of a predicate over b, h, q and kv; "" when everything is allowed.

    Raises ExpressionError for text that is not a predicate.
    """
    return predicate_to_triton(parse_predicate(predicate), load_text) if predicate else ""


def render(template: str, context: Mapping[str, Any]) -> str:
    """Returns the source of the kernel that `template` ("attention_decode") makes of `context`.

    Two entries are translated on the way: "predicate" from the text of the contract op, and "score",
    which becomes pointwise, reduce, uses_weight and uses_lse. Raises ExpressionError for bad text
    and KernelError for a template that does not exist.
    """
    name = f"{template}.py.jinja"
    if not (TEMPLATES / name).is_file():
        raise KernelError(f"there is no kernel template {template!r} in {TEMPLATES}")
    values = dict(context)
    notes = []
    if score := values.pop("score", ""):
        parsed = parse_score(score)
        notes.append(f"score: {parsed.text}")
        values["pointwise"] = pointwise_to_triton(parsed)
        values["reduce"] = parsed.reduce
        values["uses_weight"] = parsed.uses_weight
        values["uses_lse"] = parsed.uses_lse
    if predicate := values.get("predicate", ""):
        notes.append(f"predicate: {predicate}")
        values["predicate"] = predicate_text(predicate)
    values.update(template=template, notes=notes)
    text = _environment().get_template(name).render(values)
    return _tidy(text)


def _tidy(text: str) -> str:
    """Drops trailing blanks and the empty lines that unused branches leave behind."""
    lines: list[str] = []
    inside = False
    signature = False
    for line in map(str.rstrip, text.splitlines()):
        if line.startswith("def "):
            inside = signature = True
        elif line == "):":
            signature = False
        # Two empty lines stand before the kernel, one at most inside it, none between parameters.
        limit = 1 if inside else 2
        if not line and (signature or lines[-limit:] == [""] * limit):
            continue
        lines.append(line)
    return "\n".join(lines).rstrip() + "\n"


def write(path: Path, text: str) -> None:
    """Writes a file whole or not at all. Raises KernelError when the folder cannot be written."""
    try:
        write_text(path, text)
    except OSError as error:
        raise KernelError(
            f"cannot write the generated kernel {path}: {error}; "
            "point XDG_CACHE_HOME at a folder that can be written"
        ) from error


def load_module(template: str, text: str, folder: Path | None = None) -> Any:
    """Returns the module of a rendered kernel, written to `folder` and imported from there."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = (folder or default_folder()) / f"{template}_{digest}.py"
    key = str(path)
    if key in _MODULES:
        return _MODULES[key]
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write(path, text)
    spec = importlib.util.spec_from_file_location(f"clsa_kernel_{template}_{digest}", path)
    if spec is None or spec.loader is None:
        raise KernelError(f"cannot import the generated kernel {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return _MODULES.setdefault(key, module)


@functools.lru_cache(maxsize=4096)
def _kernel(template: str, items: tuple[tuple[str, Any], ...], folder: Path | None) -> Any:
    module = load_module(template, render(template, dict(items)), folder)
    return getattr(module, template)


def kernel(template: str, folder: Path | None = None, **context: Any) -> Any:
    """Returns the @triton.jit function that `template` makes of `context` (hashable values).

    The function bears the template's name. Its file lies in `folder`, or in `default_folder()`.
    """
    return _kernel(template, tuple(sorted(context.items())), folder)
