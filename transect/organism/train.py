"""Trains the bundled model: `python -m transect.organism.train --out FOLDER`, or measures one with `--evaluate FOLDER`.

Training is a pure function of the constants below and of the number of threads; the bundled weights come from the same
steps, taken with sums in another order. While it runs, everything lives in `FOLDER.part`; a run that was stopped goes
on from its last checkpoint when the same command is given again, and ends with the very same weights. A checkpoint of
another plan, or a damaged one, is not used. The finished model is moved to FOLDER at the end. The bundled model saw 11
million tokens in about 40 minutes on one core.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from transect.organism.architecture import untrained
from transect.organism.stream import Stream, skills_of_mix, stream
from transect.organism.tasks import evaluate
from transect.organism.tokenizer import LENGTH, build
from transect.organism.world import World
from transect.pretrained import pretrained
from transect.store import place_folder
from transect.training import Check, Machine, Problem, Run, Schedule, State
from transect.training import train as train_problem
from transect.version import __version__

# Facts and copying are found much sooner where attention has few unrelated documents to look past.
SHORT = 48


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train; the defaults are those of the bundled model."""

    steps: int = 5500
    batch: int = 2048  # tokens of a step
    short: int = 4200  # steps with rows of SHORT tokens, before those of LENGTH tokens
    rate: float = 2.5e-3  # the highest learning rate, after the warm-up
    warmup: int = 100  # steps
    save_every: int = 500  # steps between checkpoints
    seed: int = 0

    @property
    def schedule(self) -> Schedule:
        """Linear warm-up, then a cosine to zero."""
        return Schedule(
            lr=self.rate, warm_up=self.warmup / self.steps, every=min(self.save_every, self.steps), shuffle=False,
            seed=self.seed, options={"beta2": 0.98, "weight_decay": 0.05},
        )  # fmt: skip


class _Rows(Sequence[Any]):
    """The batch of every step: tokens, weights and kinds, each [rows, length]."""

    def __init__(self, text: Stream, plan: Plan) -> None:
        self.text, self.plan = text, plan

    def __len__(self) -> int:
        return self.plan.steps

    def __getitem__(self, step: Any) -> tuple[Tensor, Tensor, Tensor]:
        length = SHORT if step < self.plan.short else LENGTH
        return self.text.rows(step * self.plan.batch, self.plan.batch // length, length)


class _Stop(Exception):
    """Raised to interrupt a training after a checkpoint."""


def train(out: Path, plan: Plan, stop_after: int | None = None) -> None:
    """Trains and writes a model to `out`; `stop_after` interrupts it after the checkpoint of that step."""
    world = World()
    tokenizer = build(world)
    model = untrained(len(tokenizer), plan.seed)
    part = out.with_name(out.name + ".part")
    state = State(part, kind="an unfinished bundled model")
    state.begin(json.dumps(["organism", __version__, asdict(plan), torch.get_num_threads()]))
    report = _Report()

    def loss(rows: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, float]:
        tokens, weights, kinds = rows
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]  # [rows, length - 1, vocabulary]
        losses = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        report.add(logits, tokens[:, 1:], weights[:, 1:], kinds[:, 1:])
        weight = weights[:, 1:].flatten()
        return (losses * weight).sum(), float(weight.sum())

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=_console) as progress:

        def check(found: Check) -> None:
            progress.console.print(f"{found.step:5d} {report.line()}", soft_wrap=True)
            if found.step == stop_after:
                raise _Stop

        rows = _Rows(stream(world, tokenizer, plan.steps * plan.batch, plan.seed), plan)
        problem = Problem("training", dict(model.named_parameters()), rows, loss, None, model.train)
        run = Run(
            plan.schedule, Machine("cpu"), state, lambda steps, name: progress.track(steps, description=name), check
        )
        try:
            train_problem(problem, run, {})
        except _Stop:
            return
    finished = part / "model"
    model.bfloat16().save_pretrained(finished)
    tokenizer.save_pretrained(finished)
    place_folder(finished, out, lambda name: False, "config.json")
    state.remove()


class _Report:
    """Answer tokens of the training text that were predicted, by skill, since the last line."""

    def __init__(self) -> None:
        self.names = skills_of_mix()
        self.hits = torch.zeros(len(self.names))
        self.seen = torch.zeros(len(self.names))

    def add(self, logits: Tensor, targets: Tensor, weights: Tensor, kinds: Tensor) -> None:
        answers = weights == 1
        kind = kinds[answers].long()
        hit = (logits.detach().argmax(-1) == targets)[answers].float()
        self.hits.index_add_(0, kind, hit)
        self.seen.index_add_(0, kind, torch.ones_like(hit))

    def line(self) -> str:
        shares = (self.hits / self.seen.clamp(min=1)).tolist()
        self.hits.zero_()
        self.seen.zero_()
        return "  ".join(f"{name} {share:.2f}" for name, share in zip(self.names, shares, strict=True))


def accuracy_table(folder: Path, n: int) -> Table:
    """The accuracy of a stored model in every skill, on at most `n` examples each."""
    model = pretrained(AutoModelForCausalLM, folder, dtype=torch.float32)
    table = Table("skill", "accuracy", title=f"{folder.name}, greedy exact match")
    for skill, accuracy in evaluate(model, pretrained(AutoTokenizer, folder), n=n).items():
        table.add_row(skill, f"{accuracy:.1%}")
    return table


_console = Console()


def main() -> None:
    """The command line: train the bundled model, or measure one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", type=Path, metavar="FOLDER", help="train, and write the model here")
    action.add_argument("--evaluate", type=Path, metavar="FOLDER", help="print the accuracy of this model")
    parser.add_argument("--seed", type=int, default=Plan.seed, help="of the first weights and the text's order")
    arguments = parser.parse_args()
    folder = arguments.evaluate or arguments.out
    if arguments.out:
        if folder.exists():
            parser.error(f"{folder} exists")
        train(folder, Plan(seed=arguments.seed))
    _console.print(accuracy_table(folder, n=1000))


if __name__ == "__main__":
    main()
