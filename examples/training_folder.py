"""A training run's folder: checkpoints that are whole or not there."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

STATE = "state.json"


@dataclass
class State:
    """Where a run is, and what it has seen: losses by step, and what was measured after each stage."""

    stage: int
    step: int
    history: list[dict[str, Any]] = field(default_factory=list)
    evaluations: dict[str, Any] = field(default_factory=dict)


class Folder:
    """Keeps the last checkpoint: tensors in a file of their own, which state.json names once it is there.

    `run` is what the run depends on; SystemExit where the folder holds another run.
    """

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        self.path, self._run = path, json.loads(json.dumps(run))
        stored = self._stored()
        if stored is not None and stored["run"] != self._run:
            differing = sorted(differences(stored["run"], self._run))
            raise SystemExit(
                f"{path} holds a run with other settings ({', '.join(differing)}); give another --out, "
                "or the same settings to go on"
            )

    def _stored(self) -> dict[str, Any] | None:
        try:
            return json.loads((self.path / STATE).read_text())
        except FileNotFoundError:
            return None

    def state(self) -> State | None:
        """Returns where the run was at its last checkpoint, None for a new one."""
        stored = self._stored()
        return None if stored is None else State(**stored["state"])

    def save(self, state: State, model: nn.Module, optimizers: list[Optimizer]) -> None:
        """Writes a checkpoint; until its very end the one before stays valid."""
        from safetensors.torch import save_file

        self.path.mkdir(parents=True, exist_ok=True)
        tensors = {f"model.{name}": weight for name, weight in model.named_parameters()}
        for number, optimizer in enumerate(optimizers):
            for index, values in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{number}.{index}.{name}": value for name, value in values.items()}
        name = f"stage{state.stage}-step{state.step}.safetensors"
        tensors = {key: value.detach().contiguous() for key, value in tensors.items()}
        self._replace(name, lambda path: save_file(tensors, path))
        content = json.dumps({"run": self._run, "tensors": name, "state": asdict(state)})
        self._replace(STATE, lambda path: path.write_text(content))
        for old in self.path.glob("stage*.safetensors"):
            if old.name != name:
                old.unlink()

    def _replace(self, name: str, write: Any) -> None:
        partial = self.path / f".{name}.part"
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, self.path / name)

    @torch.no_grad()
    def load(self, state: State, model: nn.Module, optimizers: list[Optimizer]) -> None:
        """Puts a checkpoint's tensors back; `optimizers` are new ones of the state's stage."""
        from safetensors.torch import load_file

        stored = self._stored()
        assert stored is not None
        tensors = load_file(self.path / stored["tensors"])
        for name, weight in model.named_parameters():
            weight.copy_(tensors[f"model.{name}"])
        found: dict[int, dict[int, dict[str, Tensor]]] = {}
        for key, value in tensors.items():
            kind, _, rest = key.partition(".")
            if kind == "optimizer":
                number, index, name = rest.split(".")
                found.setdefault(int(number), {}).setdefault(int(index), {})[name] = value
        for number, values in found.items():
            groups = optimizers[number].state_dict()["param_groups"]
            optimizers[number].load_state_dict({"state": values, "param_groups": groups})


def differences(before: Any, now: Any, name: str = "") -> set[str]:
    """Names what differs between two settings."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = before.keys() | now.keys()
        return set().union(*(differences(before.get(k), now.get(k), k) for k in keys))
    return set() if before == now else {name}
