"""Configurations: a Hugging Face model from its configuration file, without weights, and its reports."""

from __future__ import annotations

import inspect as signatures
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from clsa_compile.errors import CaptureError, ClsaError, OptionError
from clsa_compile.inspection import inspect
from clsa_compile.prediction import LENGTHS
from clsa_compile.report import SCHEMA, Report

__all__ = ["GRAPHS", "Inspected", "inspect_configuration"]

GRAPHS = ("prefill", "decode")
# Layers from which on a second process is worth its start, which takes some seconds.
DEEP = 24


@dataclass(frozen=True, slots=True)
class Inspected:
    """The reports of a configuration, by graph: "prefill" and "decode"."""

    model_type: str
    parameters: int
    reports: Mapping[str, Report]

    def to_dict(self) -> dict[str, Any]:
        """Returns the reports as plain data, ready for JSON."""
        return {
            "schema": SCHEMA,
            "model_type": self.model_type,
            "parameters": self.parameters,
            **{name: report.to_dict() for name, report in self.reports.items()},
        }

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes the reports as one HTML file. Raises OptionError where it cannot be written."""
        from clsa_compile.html.file import write
        from clsa_compile.html.page import render

        # Single steps are what most ask about.
        reports = {name: self.reports[name] for name in reversed(GRAPHS) if name in self.reports}
        write(path, render(reports, self.model_type, f"{self.parameters:.3g} parameters"))


def inspect_configuration(
    path: Path,
    *,
    prompt: int = 2048,
    cache: int | None = None,
    batch: int = 1,
    attention: str = "sdpa",
    graphs: Sequence[str] = GRAPHS,
    options: Mapping[str, Any] | None = None,
    lengths: Sequence[int] = LENGTHS,
    device: str | None = None,
) -> Inspected:
    """Inspects a prompt of `prompt` tokens and one token after it, over a static cache of `cache` tokens.

    `cache` is the longest of `lengths` by default. Graphs of deep models are captured side by side, each in
    a process of its own. Raises OptionError for a configuration that no model can be made from, and
    CaptureError for a model that cannot be traced.
    """
    cache = max(*lengths, prompt) if cache is None else cache
    for name, value in (("prompt", prompt), ("cache", cache), ("batch", batch)):
        if value < 1:
            raise OptionError(f"{name} is {value}; give a number of at least 1")
    if prompt > cache and "prefill" in graphs:
        raise OptionError(f"a prompt of {prompt} tokens does not fit into a cache of {cache}")
    model, config = _model(path, attention)
    asked = _Asked(path, prompt, cache, batch, attention, options, tuple(lengths), device)
    depth = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if len(graphs) > 1 and depth >= DEEP and (os.cpu_count() or 1) > 1:
        # Started afresh: a copy of a process that has threads may hang.
        with ProcessPoolExecutor(len(graphs), get_context("spawn")) as pool:
            found = list(pool.map(asked.load_and_inspect, graphs))
    else:
        found = [asked.inspect(model, config, name) for name in graphs]
    parameters = sum(p.numel() for p in model.parameters())
    return Inspected(config.model_type, parameters, dict(zip(graphs, found, strict=True)))


@dataclass(frozen=True, slots=True)
class _Asked:
    """What `inspect_configuration` was asked, for one graph at a time."""

    path: Path
    prompt: int
    cache: int
    batch: int
    attention: str
    options: Mapping[str, Any] | None
    lengths: tuple[int, ...]
    device: str | None

    def load_and_inspect(self, graph: str) -> Report:
        """Returns the report of one graph of a model that is made for it."""
        model, config = _model(self.path, self.attention)
        return self.inspect(model, config, graph)

    def inspect(self, model: Any, config: Any, graph: str) -> Report:
        """Returns the report of one graph of a model."""
        held = _cache(model, config, self.batch, self.cache, is_empty=graph == "prefill")
        tokens = self.prompt if graph == "prefill" else 1
        ids = torch.zeros(self.batch, tokens, dtype=torch.long, device="meta")
        settings: dict[str, Any] = {"options": self.options, "lengths": self.lengths, "device": self.device}
        if _takes(model, "logits_to_keep"):
            settings["logits_to_keep"] = 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what is left, and why, stands in the report
                return inspect(model, ids, past_key_values=held, **settings)
        except ClsaError:
            raise
        except Exception as error:
            raise CaptureError(
                f"the {graph} of this {config.model_type} cannot be traced: {_first_line(error)}"
            ) from error


def _model(path: Path, attention: str) -> tuple[Any, Any]:
    """Returns a model on the meta device and its configuration. Raises OptionError."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError as error:
        raise OptionError("inspecting a configuration needs transformers: pip install clsa[hf]") from error
    data = _read(path / "config.json" if path.is_dir() else path)
    kind = data.get("model_type")
    if not isinstance(kind, str):
        raise OptionError(f"cannot make a model from {path}: it names no model_type")
    if kind not in CONFIG_MAPPING:
        raise OptionError(
            f"cannot make a model from {path}: this transformers has no model type {kind!r}; "
            "upgrade it, or pass a model of your own to clsa_compile.inspect"
        )
    try:
        config: Any = CONFIG_MAPPING[kind].from_dict(data)
        config._attn_implementation = attention
        dtype = getattr(config, "dtype", None) or torch.bfloat16
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype).eval(), config
    except Exception as error:  # transformers checks configurations with exceptions of many kinds
        raise OptionError(f"cannot make a model from {path}: {_first_line(error)}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"cannot make a model from {path}: {error}") from error
    except json.JSONDecodeError as error:
        raise OptionError(f"cannot make a model from {path}: it is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise OptionError(f"cannot make a model from {path}: it holds no object")
    return data


def _cache(model: Any, config: Any, batch: int, length: int, is_empty: bool) -> Any:
    """Returns a static cache that has its tensors, as `generate` makes them before a compiled step.

    Windows are full unless it is to be empty: their length is a number that Python knows, and decides what a
    step does. A model that does not run on the meta device gets a cache that makes its tensors in the graph.
    """
    from transformers import StaticCache

    cache: Any = StaticCache(config=config, max_cache_len=length)
    try:
        with torch.no_grad():
            model(torch.zeros(batch, 1, dtype=torch.long, device="meta"), past_key_values=cache)
        if is_empty:
            cache.reset()
            return cache
        for layer in cache.layers:
            if hasattr(layer, "cumulative_length_int"):
                layer.cumulative_length_int = length
    except Exception:
        cache = StaticCache(config=config, max_cache_len=length)
    return cache


def _takes(model: Any, name: str) -> bool:
    return name in signatures.signature(model.forward).parameters


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
