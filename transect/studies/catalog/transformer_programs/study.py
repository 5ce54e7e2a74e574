"""The study: models of several seeds are trained on a task, hardened, and written down as programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ....errors import Diverged, TransectError
from ....forward.objective import IGNORED
from ....parameters import Range
from ....probes import Drawing, Listing, Quantity, Result, Table
from ....probes.draw import lines
from ...registry import Bench, studying
from .fitting import fit, sampled
from .model import ProgramModel, Sizes, agreement, hardened, predicted
from .reading import LARGEST, read
from .tasks import TASKS, Labelled, drawn, split
from .writing import decompiled, runner

Name = Literal["reverse", "hist", "double_hist", "sort", "most_freq", "dyck-1", "dyck-2", "induction"]
Count = Annotated[int, Range(0, 16)]
MEASURES = (
    "sampled", "hardened", "hardened, tested", "hardened as sampled", "program as hardened", "program, tested"
)  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """One seed. measures: see `measured`. reads: of every head and MLP its name and what it reads."""

    measures: Tensor
    loss: Tensor
    program: str
    reads: Sequence[tuple[str, Sequence[str]]]


def draw(result: Result) -> list[Drawing]:
    """Every seed in numbers, the course of training, what is read, and the program."""
    seeds = result.label("seed", len(result["measures"]))
    rows = [[seed, *(f"{value:.4f}" for value in row)] for seed, row in zip(seeds, result["measures"], strict=True)]
    names = result.label("variable", 0)
    units = result.label("unit", len(result["reads"]))
    reads = [
        [unit, *("" if one < 0 else names[one] for one in row)]
        for unit, row in zip(units, result["reads"].tolist(), strict=True)
    ]
    return [
        Table(
            "Every seed",
            "Shares of labels. Sampled: as trained, at the last temperature. Hardened: every choice its largest. "
            "Tested: on sequences that neither trained nor chose a seed.",
            ["seed", *result.label("measure", len(MEASURES))], rows,
        ),
        lines(
            "Training loss", "Nats a label, as the temperature falls; samples of the Gumbel-softmax are part of it.",
            dict(zip((f"seed {one}" for one in seeds), result["loss"], strict=True)), xlabel="part of the training",
            ylabel="nats",
        ),
        Table(
            "What is read", "Of the best seed: the variables that each head and MLP reads.",
            ["", "query or first input", "key or second input", "value"], reads,
        ),
        Listing("The program", "Of the best seed; program.py in the folder.", "\n".join(result.label("line", 0))),
    ]  # fmt: skip


@studying(
    "transformer-programs", title="A transformer as a Python program", paper="arXiv:2306.01128", draw=draw,
    files=("program.py",),
)  # fmt: skip
def transformer_programs(
    bench: Bench, *, task: Name = "sort", vocabulary: Annotated[int, Range(0, 100)] = 0,
    length: Annotated[int, Range(0, 64)] = 0, values: Annotated[int, Range(0, 100)] = 0,
    samples: Annotated[int, Range(50, 1_000_000)] = 5000, layers: Annotated[int, Range(1, 8)] = 2, heads: Count = 4,
    numerical_heads: Count = 4, mlps: Count = 2, numerical_mlps: Count = 2,
    hidden: Annotated[int, Range(1, 1024)] = 64, causal: bool = False, epochs: Annotated[int, Range(1, 100_000)] = 250,
    batch: Annotated[int, Range(1, 65_536)] = 512, rate: Annotated[float, Range(0, 1, above=True)] = 0.05,
    seeds: Annotated[int, Range(1, 100)] = 3,
) -> Result:  # fmt: skip
    """A constrained transformer learns a task and becomes a Python program that computes exactly the same.

    The model's stream is a list of variables, words or counts. Each head and MLP chooses what it reads, and writes one
    new variable. Choices are sampled ever more sharply in training; then each is its largest, and the model is written
    down as program.py, which needs nothing but Python. Several seeds are trained, since many fail; the best on
    validation sequences is kept, and judged on others. Friedman et al., NeurIPS 2023. The trained models are in the
    folder's `made`, for `ProgramModel.of`.

    task: what is learned: reverse, sort, how often each word is there (hist), how many words are as frequent as it
        (double_hist), words by frequency (most_freq), prefixes of balanced brackets of one or two kinds (dyck-1,
        dyck-2), or the digit that stood behind a letter before (induction).
    vocabulary: how many words, with marks and padding; 0 for the task's own (8, of induction 10).
    length: of the longest sequence, with marks; 0 for the task's own (8, of dyck 16, of induction 10).
    values: that a variable can have; 0 for as few as hold every word and position.
    samples: sequences, all different; a tenth is to judge by, and of the others a tenth to choose the seed.
    layers: how many.
    heads: in a layer, each a look-up: the nearest key that its predicate wants gives one of its variables.
    numerical_heads: in a layer, each a count: over all keys that its predicate wants.
    mlps: in a layer, each a table from two words or positions to a new variable.
    numerical_mlps: in a layer, each a table from two counts to a new variable.
    hidden: neurons of an MLP, in training.
    causal: let no position see what is behind it, also where the task does not ask for that (dyck and induction do).
    epochs: passes over the data; over all of them the temperature falls.
    batch: sequences in a step.
    rate: of Adam.
    seeds: how many models.
    """
    data = drawn(task, samples, bench.seed, vocabulary, length)
    longest = data.inputs.shape[1]
    sizes = Sizes(
        len(data.words), len(data.labels), longest, values or max(len(data.words), longest), layers, heads,
        numerical_heads, mlps, numerical_mlps, hidden, causal or TASKS[task].causal,
    )  # fmt: skip
    check(sizes)
    parts = split(data)
    found = []
    for seed in range(bench.seed, bench.seed + seeds):

        def make(seed: int = seed) -> dict[str, Tensor]:
            return fit(
                sizes, parts[0], epochs=epochs, batch=batch, rate=rate, seed=seed, device=bench.device,
                progress=bench.progress,
            )  # fmt: skip

        tensors = bench.once(f"seed-{seed}", make)
        found.append(measured(tensors, parts[1], parts[2], seed))
    measures = torch.stack([one.measures for one in found])
    if measures.isnan().all():
        raise Diverged("transformer-programs: the training loss stopped being finite in every seed: lower the rate")
    best = int(measures[:, 1].nan_to_num(-1).argmax())
    bench.write("program.py", found[best].program)
    return _told(task, bench.seed, found, measures, best)


def check(sizes: Sizes) -> None:
    """Raise TransectError where the tables of counts would be too large to write down."""
    largest = sizes.length**sizes.layers
    if sizes.numerical_mlps and sizes.numerical_heads and largest > LARGEST:
        raise TransectError(
            f"{sizes.layers} layers over {sizes.length} positions can count to {largest:,}, and a table of counts "
            f"goes to {LARGEST:,}: lower layers or length, or leave numerical_mlps out"
        )


def measured(tensors: dict[str, Tensor], chosen: Labelled, tested: Labelled, seed: int) -> Trained:
    """What came of a training.

    Its measures, by MEASURES: accuracy as sampled and hardened on the sequences that choose a seed, and hardened on
    those to judge by; how often both predict the same label, of those that are asked for; how often the program gives
    the hardened model's label, of all words' in either part. All NaN where the loss stopped being finite.
    """
    loss = tensors["training_loss"]
    if not loss.isfinite().all():
        return Trained(torch.full((len(MEASURES),), torch.nan, dtype=torch.float64), loss, "", [])
    model = ProgramModel.of(tensors)
    hard = hardened(model)
    program = decompiled(hard, chosen.words, chosen.labels)
    soft, predictions = sampled(model, chosen.inputs, seed), predicted(hard, chosen.inputs)
    last, asked = predicted(hard, tested.inputs), chosen.targets != IGNORED
    measures = torch.tensor([
        agreement(soft, chosen.targets, asked), agreement(predictions, chosen.targets, asked),
        agreement(last, tested.targets, tested.targets != IGNORED), agreement(soft, predictions, asked),
        agreement(ran(program, chosen), predictions, chosen.inputs != 0),
        agreement(ran(program, tested), last, tested.inputs != 0),
    ], dtype=torch.float64)  # fmt: skip
    steps = [step for layer in read(hard, chosen.words).layers for step in layer]
    reads = [(step.output.name.removesuffix("_output"), [one.name for one in step.reads]) for step in steps]
    return Trained(measures, loss, program, reads)


def ran(program: str, data: Labelled) -> Tensor:
    """What a program says of every position, as ids of labels (N, T); -1 at padding."""
    run, ids = runner(program), {label: i for i, label in enumerate(data.labels)}
    predictions = torch.full_like(data.inputs, -1)
    for row, said in enumerate(data.said()):
        predictions[row, : len(said)] = torch.tensor([ids[label] for label in run(said)])
    return predictions


def _told(task: str, first: int, found: Sequence[Trained], measures: Tensor, best: int) -> Result:
    """measures: (seeds, MEASURES)."""
    kept, accuracy = found[best], measures[:, 2]
    variables = list(dict.fromkeys(name for _, names in kept.reads for name in names))
    reads = torch.full((len(kept.reads), 3), -1)
    for row, (_, names) in enumerate(kept.reads):
        reads[row, : len(names)] = torch.tensor([variables.index(name) for name in names])
    text = kept.program.splitlines()
    same = float(measures[:, 4:].nan_to_num(1).min())
    findings = [
        f"{task}: seed {first + best}, the best of {len(found)} on the validation sequences, labels "
        f"{accuracy[best]:.2%} of the words of the test sequences right once hardened; the median seed "
        f"{accuracy.nanmedian():.2%}.",
        f"Before hardening it labels {measures[best, 0]:.2%} of the validation words right, hardened "
        f"{measures[best, 1]:.2%}; both predict the same label for {measures[best, 3]:.2%} of them.",
        f"The programs give the label of the hardened models for {same:.2%} of all words, in every seed"
        f"{'' if same == 1 else ' or better'}; program.py has {len(text)} lines.",
    ]
    broken = [str(first + i) for i, one in enumerate(found) if not one.loss.isfinite().all()]
    if broken:
        findings.append(f"The training loss of seed {', '.join(broken)} stopped being finite; lower the rate.")
    losses = pad_sequence([one.loss for one in found], batch_first=True, padding_value=torch.nan)
    return Result(
        {
            "measures": Quantity(measures, ("seed", "measure"), "share", "of labels: accuracies and agreements"),
            "loss": Quantity(losses, ("seed", "check"), "nats", "mean training loss of a label since the check before"),
            "reads": Quantity(reads, ("unit", "part"), "", "which variable is read, of the best seed; -1 for none"),
        },
        findings,
        [
            "Seeds differ much: that none solves a task does not say that no program of this size does.",
            "A program says what the model computes, not that its author would have meant it so: names are of places.",
        ],
        {
            "seed": [str(first + i) for i in range(len(found))], "measure": MEASURES, "variable": variables,
            "unit": [unit for unit, _ in kept.reads], "part": ["query", "key", "value"], "line": text,
        },
    )  # fmt: skip
