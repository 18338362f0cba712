"""Watch: who is told what becomes of a graph: a dump, torch's trace, the log. Costs nothing where nobody is.

`TORCH_TRACE=folder` makes torch keep structured logs, which tlparse shows; ours are artifacts among them.
`TORCH_LOGS="clsa_compile"` prints a line a graph, `"+clsa_compile"` reasons and choices too.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from clsa_compile.config import Options
from clsa_compile.errors import OptionError
from clsa_compile.ir.captured import Captured
from clsa_compile.ir.plan import Plan
from clsa_compile.passes.lower import Choice
from clsa_compile.passes.pipeline import Decision

__all__ = ["Stopped", "Watch", "log"]

log = logging.getLogger("clsa_compile")

# `torch._logging.set_logs(modules={"clsa": logging.INFO})` then knows the short name. TORCH_LOGS is read
# before anything of ours is imported, and takes modules' names only. Where torch has no such register, it is
# logging as usual.
with suppress(AttributeError, ImportError, TypeError):
    torch._logging._internal.register_log("clsa", "clsa_compile")

_TRACED = ("captured", "rewritten", "lowered")


class Stopped(Exception):
    """The pipeline has reached the stage after which it was to stop."""


@dataclass(slots=True)
class Watch:
    """What is told of one graph. `inputs` are those of its first call."""

    options: Options
    inputs: Sequence[Any] = ()
    dump: Any = None
    _since: float = field(default_factory=time.perf_counter)

    @classmethod
    def open(cls, options: Options, inputs: Sequence[Any]) -> Watch:
        """Makes the folder of a dump where one is asked for. Raises OptionError when that cannot be."""
        if options.dump is None:
            return cls(options, inputs)
        # Whoever dumps nothing need not wait for the import.
        from clsa_compile.dump import Dump
        from clsa_compile.dump.folder import Folder

        return cls(options, inputs, Dump(Folder.new(options.dump), options, inputs))

    def stage(self, name: str, captured: Captured) -> None:
        """Is told of a stage. Raises Stopped where the pipeline is to stop after it."""
        if name in _TRACED:
            _trace(f"clsa_{name}", "string", lambda: _code(captured))
        self._dump("stage", name, captured)
        self._stop_after(name)

    def decision(self, captured: Captured, decision: Decision) -> None:
        """Is told what will be done. Raises Stopped where the pipeline is to stop after it."""
        _trace("clsa_plan", "json", lambda: json.dumps(decision.plan.to_dict()))
        self._dump("decision", captured, decision)
        _log_reasons(decision.plan)
        self._stop_after("plan")

    def choices(self, choices: tuple[Choice, ...]) -> None:
        """Is told what each contract op became."""
        _trace("clsa_choices", "json", lambda: json.dumps([asdict(choice) for choice in choices]))
        self._dump("choices", choices)
        for choice in choices:
            when = " when it is called" if choice.waits else ""
            log.debug("clsa: %s -> %s%s %s", choice.op, choice.variant, when, "; ".join(choice.passed_over))

    def stopped(self, stage: Stopped) -> None:
        """Is told that a graph goes to Inductor as it was after a stage."""
        log.info("clsa: stopped after %s; the graph goes to Inductor as it was then", stage)

    def transformed(self, plan: Plan) -> None:
        """Is told that the passes are through with a graph."""
        log.info(
            "clsa: %d attentions: %d sparse, %d read once, %d left; %d index nodes; %.2f s",
            len(plan.sites),
            plan.count("sparse"),
            plan.count("attention"),
            plan.count("left"),
            sum(group.runs_index for group in plan.groups),
            time.perf_counter() - self._since,
        )

    def left(self, why: str, error: BaseException | None = None) -> None:
        """Is told that a graph goes to Inductor as it came."""
        log.info(why)
        _trace("clsa_left", "string", lambda: why)
        self._dump("left", why, error)

    def done(self) -> None:
        """Is told that Inductor is through."""
        self._dump("done")

    def _dump(self, event: str, *args: Any) -> None:
        """Tells the dump. A graph that it cannot write compiles nevertheless; only its folder is an error."""
        if self.dump is None:
            return
        try:
            getattr(self.dump, event)(*args)
        except OptionError:
            raise
        except Exception as error:
            log.warning("clsa: the dump is not whole: %s: %s", type(error).__name__, error)

    def _stop_after(self, name: str) -> None:
        if self.options.stop_after == name:
            raise Stopped(name)


def _trace(name: str, encoding: str, payload: Callable[[], str]) -> None:
    """Adds an artifact to torch's structured log; the payload is made where there is one only."""
    torch._logging.trace_structured(  # type: ignore[attr-defined]
        "artifact", metadata_fn=lambda: {"name": name, "encoding": encoding}, payload_fn=payload
    )


def _code(captured: Captured) -> str:
    from clsa_compile.dump.code import code_of

    try:
        return code_of(captured.module)
    except Exception as error:
        return f"# this graph cannot be written: {type(error).__name__}: {error}\n"


def _log_reasons(plan: Plan) -> None:
    if not log.isEnabledFor(logging.DEBUG):
        return
    for site in plan.sites:
        because = f": {site.reason}" if site.reason else ""
        log.debug("clsa: layer %d (%s): %s%s", site.layer, site.path, site.action, because)
