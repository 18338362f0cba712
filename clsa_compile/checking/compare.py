"""check(): the same call by eager, Inductor and clsa, compared with float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from clsa_compile.checking.blame import blame, interpreted
from clsa_compile.checking.calls import Call, doubled, tensors
from clsa_compile.checking.differences import ROUNDINGS, ROUNDINGS_OF_TWO, Check, Measure, Named, differences
from clsa_compile.checking.layers import layers
from clsa_compile.config import Options
from clsa_compile.errors import OptionError
from clsa_compile.ir.sharing import SharingPlan

__all__ = ["check"]


def check(
    model: Callable[..., Any],
    *args: Any,
    options: Mapping[str, Any] | None = None,
    inductor: bool = True,
    **kwargs: Any,
) -> Check:
    """Runs `model(*args, **kwargs)` in eager mode, through Inductor and through clsa, and compares.

    Every run gets copies of the arguments, so caches stay as they are. The measure is the same model in
    float64; the budget of each tensor is a few times eager's own distance from that. Where clsa departs,
    passes and layers are left out until it does not. Without `inductor` only graphs are compared, which takes
    no compiler. Raises OptionError for what cannot be run.
    """
    chosen = Options.read(options)
    _refuse(model, args, kwargs)
    if isinstance(chosen.share, SharingPlan) and isinstance(model, nn.Module):
        chosen.share.check_weights(model.named_parameters())
    call = Call(model, args, kwargs)
    eager = call.run(None), layers(call, None)
    measure = measured(call, eager)
    ours = call.run("clsa", options) if inductor else call.run(interpreted(chosen))
    theirs = call.run("inductor") if inductor else {}
    made = Check(
        layers=differences(measure, 1, layers(call, chosen), {}),
        tensors=differences(measure, 0, ours, theirs),
        changes_results=chosen.topk is not None or chosen.share != "off",
        note=measure.note,
    )
    return made if made.ok else replace(made, blame=blame(call, chosen, measure, made, inductor))


def measured(call: Call, eager: tuple[Named, Named]) -> Measure:
    """Returns results in float64, or where an operator of the model has none, eager's own."""
    exact = Call(*doubled(call.model, call.args, call.kwargs))
    try:
        return Measure((exact.run(None), layers(exact, None)), eager, ROUNDINGS)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        note = f"compared with eager itself, since the model does not run in float64: {reason}"
        return Measure(eager, eager, ROUNDINGS_OF_TWO, note)


def _refuse(model: Any, args: Any, kwargs: Any) -> None:
    if isinstance(model, nn.Module) and model.training:
        raise OptionError(
            "the model is in training mode, where runs differ from each other: call model.eval()"
        )
    weights = model.parameters() if isinstance(model, nn.Module) else ()
    given = [x for _, x in (*tensors(args, ""), *tensors(dict(kwargs), ""))]
    if any(x.is_meta for x in (*weights, *given)):
        raise OptionError(
            "check runs the model: it needs weights and inputs with values, not on the meta device"
        )
