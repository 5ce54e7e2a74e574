"""Trains the bundled model: `python -m transect.organism.train --out FOLDER`, or measures one with `--evaluate FOLDER`.

Training is a pure function of the constants below and of the number of threads. While it runs, everything lives in
`FOLDER.part`; a run that was stopped goes on from its last checkpoint when the same command is given again, and ends
with the very same weights. A checkpoint of another plan, or a damaged one, is not used. The finished model is moved to
FOLDER at the end. The bundled model saw 11 million tokens in about 40 minutes on one core.
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from transect.organism.architecture import untrained
from transect.organism.stream import skills_of_mix, stream
from transect.organism.tasks import evaluate
from transect.organism.tokenizer import LENGTH, build
from transect.organism.world import World
from transect.pretrained import pretrained
from transect.store import keep, kept, place_folder
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

    def rate_at(self, step: int) -> float:
        """Linear warm-up, then a cosine to zero."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        return self.rate * (1 + math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup))) / 2


def train(out: Path, plan: Plan, stop_after: int | None = None) -> None:
    """Trains and writes a model to `out`; `stop_after` interrupts it after the checkpoint of that step."""
    world = World()
    tokenizer = build(world)
    model = untrained(len(tokenizer), plan.seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    part = out.with_name(out.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    checkpoint = part / "checkpoint.safetensors"
    of = json.dumps(["organism", __version__, asdict(plan), torch.get_num_threads()])
    start = _resume(checkpoint, of, model, optimizer)
    text = stream(world, tokenizer, plan.steps * plan.batch, plan.seed)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    report = _Report()
    with Progress(*columns, TimeRemainingColumn(), console=_console) as progress:
        bar = progress.add_task("training", total=plan.steps, completed=start)
        for step in range(start, plan.steps):
            length = SHORT if step < plan.short else LENGTH
            tokens, weights, kinds = text.rows(step * plan.batch, plan.batch // length, length)
            for group in optimizer.param_groups:
                group["lr"] = plan.rate_at(step)
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]  # [batch, LENGTH - 1, vocabulary]
            losses = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
            weight = weights[:, 1:].flatten()
            (losses * weight).sum().div(weight.sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            report.add(logits, tokens[:, 1:], weights[:, 1:], kinds[:, 1:])
            progress.advance(bar)
            if (step + 1) % 100 == 0:
                progress.console.print(f"{step + 1:5d} {report.line()}", soft_wrap=True)
            if (step + 1) % plan.save_every == 0:
                _save(checkpoint, of, model, optimizer, step + 1)
            if step + 1 == stop_after:
                return
    finished = part / "model"
    model.bfloat16().save_pretrained(finished)
    tokenizer.save_pretrained(finished)
    place_folder(finished, out, lambda name: False, "config.json")
    checkpoint.unlink(missing_ok=True)
    part.rmdir()


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


def _save(path: Path, of: str, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Weights and both moments of AdamW in one file. of: names the plan."""
    tensors = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        tensors |= {f"weight {name}": parameter}
        tensors |= {f"{key} {name}": state[key] for key in ("step", "exp_avg", "exp_avg_sq")}
    keep(path, tensors, of, step)


def _resume(path: Path, of: str, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> int:
    """Puts a checkpoint into model and optimizer; returns the number of steps that were done, 0 without one."""
    found = kept(path, of)
    if found is None:
        return 0
    for name, parameter in model.named_parameters():
        parameter.data.copy_(found[f"weight {name}"])
        optimizer.state[parameter] = {key: found[f"{key} {name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
    return found.note


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
    arguments = parser.parse_args()
    folder = arguments.evaluate or arguments.out
    if arguments.out:
        if folder.exists():
            parser.error(f"{folder} exists")
        train(folder, Plan())
    _console.print(accuracy_table(folder, n=1000))


if __name__ == "__main__":
    main()
