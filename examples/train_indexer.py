"""Trains the one index of a small decoder that caches once, as the paper does, and says what it costs.

Three stages (arXiv 2606.06467, at a size of minutes):

    dense   the backbone, from scratch: next bytes of text, and pairs to be recalled from far back
    index   the indexer alone: KL from the mean dense cross-attention over layers and heads to softmax(I)
    joint   both, attending to what the index selects: next bytes, plus 0.1 times the KL on what is selected

After each stage the dense and the sparse decoder are compared on text that was held out: loss, needles by
depth, and the attention mass that the selected tokens hold. Nothing is downloaded:

    python examples/train_indexer.py --out runs/indexer            # a GPU, some minutes
    python examples/train_indexer.py --out runs/tiny --tiny        # two CPU cores, a minute or two

The same command goes on after an interruption and loses no more than an interval of steps; on a CPU it then
ends where it would have ended, bit for bit. The picture needs matplotlib, checkpoints need safetensors
(`pip install -e .[search]`). The exit code is 1 where sparse falls short of dense, 2 where time ran out.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from index_training import Coverage, coverage, divergence, look, new_decoder, next_token_loss, split_weights
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Generator, Tensor
from torch.optim import AdamW, Muon, Optimizer
from training_folder import Folder, State
from training_report import draw, table, verdict
from training_text import VOCABULARY, Text, lesson, needle, passages, read, standard_library
from yoco_decoder import Config

STAGES = ("dense", "index", "joint")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
EASY = 8  # keys at first

console = Console(width=None if sys.stdout.isatty() else 130)  # a log wraps no table


@dataclass(frozen=True)
class Settings:
    """All that a run depends on. steps and rates are those of the three stages."""

    config: Config
    length: int
    batch: int
    steps: tuple[int, int, int]
    # First steps, of sequences full of pairs, half of them of few keys: without, recall comes much later.
    drill: int
    rates: tuple[float, float, float] = (3e-2, 3e-3, 3e-3)
    symbols: int = 64
    lessons: float = 0.5  # of the sequences that have pairs, after the drill
    emphasis: float = 4.0  # of what a key stands for, in the loss
    weight: float = 0.1  # of the KL in the joint stage
    others: int = 3  # pairs beside a needle
    interval: int = 100  # steps between checkpoints
    evaluated: int = 64  # sequences of text, and needles at each depth
    seed: int = 0


SIZES = {
    "small": Settings(
        Config(vocabulary=VOCABULARY, layers=8, hidden=512, ffn=1536, heads=8, kv_heads=2, head_dim=64,
               window=4, topk=128, index_dim=64),
        length=1024, batch=32, steps=(3000, 500, 500), drill=800, evaluated=256,
    ),
    "tiny": Settings(
        Config(vocabulary=VOCABULARY, layers=4, hidden=64, ffn=192, heads=4, kv_heads=2, head_dim=16,
               window=2, topk=8, index_dim=32),
        length=64, batch=32, steps=(500, 100, 100), drill=60, symbols=8, interval=50,
    ),
}  # fmt: skip


def checked(settings: Settings) -> Settings:
    """Returns the settings; SystemExit with what to do where they cannot be."""
    config, length = settings.config, settings.length
    if config.topk >= length:
        raise SystemExit(
            f"--topk {config.topk} of sequences of {length} selects everything: give --topk below {length}"
        )
    if config.window >= length:
        raise SystemExit(
            f"a window of {config.window} in sequences of {length} leaves nothing to look back for"
        )
    if length < 4 * (settings.others + 2) or min(settings.steps) < 1 or settings.batch < 1:
        raise SystemExit("give --length of at least 20, and at least one step of each stage")
    return settings


class Trainer:
    """A decoder in a stage, at a step. Batches follow from seed, stage and step alone."""

    def __init__(self, settings: Settings, text: Text, folder: Folder, device: torch.device) -> None:
        self.settings, self.text, self.folder, self.device = settings, text, folder, device
        torch.manual_seed(settings.seed)
        self.model = new_decoder(settings.config).to(device)
        self.state = State(stage=0, step=0)
        self.optimizers = self._optimizers()

    def resume(self) -> bool:
        """Goes back to the last checkpoint; returns whether there was one."""
        state = self.folder.state()
        if state is None:
            return False
        self.state = state
        self.optimizers = self._optimizers()
        self.folder.load(state, self.model, self.optimizers)
        return True

    def save(self) -> None:
        """Writes a checkpoint."""
        self.folder.save(self.state, self.model, self.optimizers)

    def _optimizers(self) -> list[Optimizer]:
        """Matrices of layers by Muon, all else by AdamW; the rate is set at each step."""
        backbone, own = split_weights(self.model)
        trained = {"dense": backbone, "index": own, "joint": backbone | own}[self.stage]
        for weight in self.model.parameters():
            weight.requires_grad_(any(weight is w for w in trained.values()))
            weight.grad = None
        # The indexer learns from one loss, embeddings and norms are no matrices to be made orthogonal.
        plain = [w for n, w in trained.items() if n in own or not n.startswith("layers") or w.dim() < 2]
        matrices = [w for w in trained.values() if not any(w is p for p in plain)]
        found: list[Optimizer] = [AdamW(plain, betas=(0.9, 0.95), weight_decay=0.0)]
        if matrices:
            found.append(Muon(matrices, weight_decay=0.05, adjust_lr_fn="original"))
        return found

    @property
    def stage(self) -> str:
        """Names the stage."""
        return STAGES[min(self.state.stage, len(STAGES) - 1)]

    @property
    def done(self) -> bool:
        """Tells whether all stages are."""
        return self.state.stage == len(STAGES)

    def step(self) -> dict[str, float]:
        """Trains one step; returns its losses. ArithmeticError where one, or a gradient, is not finite."""
        settings, stage = self.settings, self.stage
        ids, known = (x.to(self.device) for x in batch(settings, self.text.train, self.state))
        with self._cast():
            sparse = settings.config.topk if stage == "joint" else None
            seen = look(self.model, ids, topk=sparse, teach=stage != "dense")
            losses = (
                {}
                if stage == "index"
                else {"loss": next_token_loss(seen.logits, ids, known=known, emphasis=settings.emphasis)}
            )
            if stage != "dense":
                losses["kl"] = divergence(seen)
            total = losses.get("loss", 0.0) + (settings.weight if stage == "joint" else 1.0) * losses.get(
                "kl", 0.0
            )
        found = {name: loss.item() for name, loss in losses.items()}
        if not all(map(math.isfinite, found.values())):
            raise ArithmeticError(f"{found} in step {self.state.step} of stage {stage}")
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        total.backward()
        trained = [w for w in self.model.parameters() if w.requires_grad]
        norm = float(torch.nn.utils.clip_grad_norm_(trained, 1.0))
        # Clipped by such a norm, weights would be no numbers, and the next checkpoint would hold them.
        if not math.isfinite(norm):
            raise ArithmeticError(f"a gradient of norm {norm} in step {self.state.step} of stage {stage}")
        self._set_rates()
        for optimizer in self.optimizers:
            optimizer.step()
        self.state.step += 1
        return found

    def _set_rates(self) -> None:
        """Warms up, stays, and falls to a tenth in the second half."""
        place, steps = self.state.step, self.settings.steps[self.state.stage]
        factor = min(1.0, (place + 1) / min(30, steps)) * min(1.0, 0.1 + 1.8 * (1 - place / steps))
        rate = self.settings.rates[self.state.stage] * factor
        adam = 1.0 if self.stage == "index" else 0.1  # what is no matrix learns more slowly
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * (adam if isinstance(optimizer, AdamW) else 1.0)

    def _cast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def next_stage(self) -> None:
        """Ends a stage: what it is worth is written down, and other weights are trained."""
        self.state.evaluations[self.stage] = self.evaluate()
        self.state.stage, self.state.step = self.state.stage + 1, 0
        if not self.done:
            self.optimizers = self._optimizers()
        self.save()

    @torch.no_grad()
    def covered(self) -> Coverage:
        """Measures on a batch of text and pairs how much of dense attention the index covers."""
        generator = Generator().manual_seed(self.settings.seed)
        ids = passages(self.text.held_out, self.settings.batch, self.settings.length, generator)
        with self._cast():
            return coverage(look(self.model, ids.to(self.device), teach=True), self.settings.config.topk)

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Compares dense with sparse on held-out text: loss of each second half, needles by depth."""
        settings, text = self.settings, self.text.held_out
        generator = Generator().manual_seed(settings.seed + 1)
        found: dict[str, Any] = {"coverage": asdict(self.covered())}
        sequences = passages(text, settings.evaluated, settings.length, generator)
        fillers = (passages(text, settings.evaluated, settings.length, generator) for _ in DEPTHS)
        hidden = [
            torch.stack([needle(f, depth, settings.others, settings.symbols, generator) for f in filler])
            for depth, filler in zip(DEPTHS, fillers, strict=True)
        ]
        for name, topk in (("dense", None), ("sparse", settings.config.topk)):
            losses = [
                next_token_loss(logits, ids, start=settings.length // 2).item()
                for ids, logits in self._each(sequences, topk)
            ]
            right = [
                torch.cat([logits[:, -2].argmax(-1) == ids[:, -1] for ids, logits in self._each(group, topk)])
                for group in hidden
            ]
            found[name] = {
                "loss": sum(losses) / len(losses),
                "needles": [r.float().mean().item() for r in right],
            }
        return found

    def _each(self, sequences: Tensor, topk: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields batches and their logits, all of one size."""
        for ids in sequences.to(self.device).split(self.settings.batch):
            with self._cast():
                yield ids, look(self.model, ids, topk=topk).logits


def batch(settings: Settings, data: Tensor, state: State) -> tuple[Tensor, Tensor]:
    """Makes a step's sequences [B, S] and says where a key's value can be known."""
    place = (settings.seed * len(STAGES) + state.stage) * 1_000_000 + state.step
    generator = Generator().manual_seed(place)
    ids = passages(data, settings.batch, settings.length, generator)
    known = torch.zeros_like(ids, dtype=torch.bool)
    drill = state.stage == 0 and state.step < settings.drill
    largest, symbols = settings.length // 2, settings.symbols
    if drill:
        grown = max(0.0, 2 * state.step / settings.drill - 1) * (symbols // EASY).bit_length()
        symbols = min(symbols, EASY << int(grown))
    for i in range(settings.batch if drill else round(settings.batch * settings.lessons)):
        fewest = largest if drill else max(settings.length // 16, 1)
        pairs = int(torch.randint(fewest, largest + 1, (), generator=generator))
        ids[i], known[i] = lesson(ids[i], pairs, symbols, generator)
    return ids, known


def train(trainer: Trainer, minutes: float | None) -> bool:
    """Runs all stages from where they are; returns False when time ran out."""
    settings, state = trainer.settings, trainer.state
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    begin = time.monotonic()
    with Progress(*columns, console=console) as progress:
        bars = [progress.add_task(name, total=n) for name, n in zip(STAGES, settings.steps, strict=True)]
        for bar, total in list(zip(bars, settings.steps, strict=True))[: state.stage]:
            progress.update(bar, completed=total)
        while not trainer.done:
            number, name = state.stage, trainer.stage
            try:
                found = trainer.step()
            except ArithmeticError as error:
                raise SystemExit(
                    f"training diverged: {error}. {trainer.folder.path} holds the last good checkpoint; "
                    "start again in another --out with a smaller --rate"
                ) from error
            entry = {"stage": name, "step": state.step, **found}
            whole = state.step == settings.steps[number]
            if whole or state.step % settings.interval == 0:
                entry |= asdict(trainer.covered())
            state.history.append(entry)
            words = ", ".join(f"{key} {value:.3f}" for key, value in found.items())
            progress.update(bars[number], completed=state.step, description=f"{name}: {words}")
            if not console.is_terminal and (whole or state.step % settings.interval == 0):
                spent = time.monotonic() - begin
                console.print(f"{spent:.0f} s: {name} {state.step}/{settings.steps[number]}, {words}")
            if whole:
                trainer.next_stage()
            elif state.step % settings.interval == 0:
                trainer.save()
                if minutes is not None and time.monotonic() - begin > 60 * minutes:
                    return False
    return True


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and results")
    parser.add_argument("--tiny", action="store_true", help="a size for two CPU cores")
    parser.add_argument(
        "--text", type=Path, nargs="+", help="files to train on; the standard library by default"
    )
    parser.add_argument("--steps", type=int, nargs=3, metavar=tuple(STAGES))
    parser.add_argument("--drill", type=int, help="first steps, full of pairs")
    parser.add_argument("--rate", type=float, help="of the dense stage")
    parser.add_argument("--length", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--topk", type=int)
    parser.add_argument("--window", type=int)
    parser.add_argument("--interval", type=int, help="steps between checkpoints")
    parser.add_argument("--evaluated", type=int, help="sequences of text, and needles at each depth")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--minutes", type=float, help="stop at the first checkpoint after so long")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def settings_of(chosen: argparse.Namespace) -> Settings:
    """Returns a size's settings with what the command line overrides."""
    settings = SIZES["tiny" if chosen.tiny else "small"]
    given = {k: getattr(chosen, k) for k in ("length", "batch", "interval", "seed", "drill", "evaluated")}
    given["steps"] = chosen.steps and tuple(chosen.steps)
    given["rates"] = chosen.rate and (chosen.rate, *settings.rates[1:])
    sizes = {k: getattr(chosen, k) for k in ("topk", "window") if getattr(chosen, k) is not None}
    settings = replace(settings, **{k: v for k, v in given.items() if v is not None})
    return checked(replace(settings, config=replace(settings.config, **sizes)))


def main(arguments: list[str] | None = None) -> int:
    """Trains and compares; see the module for the exit code."""
    chosen = parse_arguments(arguments)
    settings, device = settings_of(chosen), torch.device(chosen.device)
    try:
        text = read(chosen.text or standard_library(), settings.length)
    except (ValueError, OSError) as error:
        raise SystemExit(f"no text to train on: {error}") from error
    folder = Folder(
        chosen.out, {"settings": asdict(settings), "text": text.checksum, "torch": torch.__version__}
    )
    trainer = Trainer(settings, text, folder, device)
    if trainer.resume():
        console.print(f"going on at step {trainer.state.step} of stage {trainer.stage}")
    count = sum(w.numel() for w in trainer.model.parameters())
    console.print(f"{count / 1e6:.1f} M weights, {len(text.train) / 1e6:.1f} MB of text, on {device}")
    finished = train(trainer, chosen.minutes)
    draw(trainer.state, folder.path / "training.png")
    if not finished:
        console.print("time is up; the same command goes on")
        return 2
    title = f"held-out text, {settings.length} bytes, top {settings.config.topk}; mass: of dense attention"
    console.print(table(trainer.state, title, DEPTHS))
    good, words = verdict(trainer.state)
    console.print(words)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
