"""checking/traced.py: graphs are found once, and made again for each backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from clsa_compile.checking.calls import Call
from clsa_compile.checking.traced import Traced


def times(factor: float, seen: list[float]) -> Callable[..., Any]:
    """A backend whose code gives `factor` times what the graph gives."""

    def backend(gm: Any, inputs: Any) -> Any:
        seen.append(factor)
        return lambda *values: tuple(factor * x for x in gm.forward(*values))

    return backend


def test_backends_take_turns_over_one_graph() -> None:
    traced = Traced(lambda x: x + 1)
    seen: list[float] = []
    one, two = times(1, seen), times(2, seen)
    assert [traced.by(backend)(torch.ones(2)).tolist() for backend in (one, one, two)] == [[2, 2]] * 2 + [
        [4, 4]
    ]
    assert seen == [1, 2]
    assert traced.graphs == 1


def test_a_graph_that_does_not_fit_is_made_for_the_backend_whose_turn_it_is() -> None:
    traced = Traced(lambda x: x + 1)
    seen: list[float] = []
    traced.by(times(1, seen))(torch.ones(2))
    assert traced.by(times(2, seen))(torch.ones(2, dtype=torch.float64)).tolist() == [4, 4]
    assert traced.graphs == 2


def test_a_call_traces_once_and_every_run_sees_the_same_arguments() -> None:
    def grown(state: dict[str, Any]) -> torch.Tensor:
        state["rows"].add_(1)
        state["all"] = torch.cat([state["all"], state["rows"]])
        return state["all"]

    rows = torch.zeros(1, 2)
    torch._dynamo.mark_static_address(rows)
    state = {"rows": rows, "all": torch.zeros(3, 2)}
    call, seen = Call(grown, (state,), {}), []
    for factor in (1, 2, 3):
        assert call.run(times(factor, seen))["output"].tolist() == [[0, 0]] * 3 + [[factor] * 2]
    assert seen == [1, 2, 3]
    assert call._traced is not None
    assert call._traced.graphs == 1
    assert rows.tolist() == [[0, 0]]
    assert state["all"].shape == (3, 2)


def test_a_call_is_traced_anew_where_graphs_do_not_fit() -> None:
    """Dynamo gives a function up after a few graphs, and runs it as it is from then on."""
    runs: list[float] = []

    def other(x: torch.Tensor) -> torch.Tensor:
        return x * len(runs)

    call = Call(other, (torch.ones(2),), {})
    seen: list[float] = []
    for n in range(12):
        assert call.run(times(2, seen))["output"].tolist() == [2 * n, 2 * n]
        runs.append(n)
    assert len(seen) == 12
