"""The study: train a small zoo over widths and temperatures, measure every cell, and name the phases."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from ....parameters import Range
from ....probes import Quantity, Result
from ...numbers import numbers
from ...registry import Bench, studying
from .pictures import draw
from .recipes import MATERIALS, Temperature, recipe, refuse_batch
from .told import told
from .zoo import ABOUT, phase_map

NAME = "model-zoo-phases"
SLOWEST = 1e-12  # a learning rate
TEMPERATURES = {"batch-size": "8,32,128,512", "learning-rate": "0.01,0.03,0.1,0.3"}
PHASES = ("I", "II", "III", "IV-A", "IV-B", "IV", "diverged")


@studying(NAME, title="Phases of a training recipe", paper="arXiv:2504.18072", draw=draw)
def model_zoo_phases(
    bench: Bench,
    *,
    task: Literal["digits", "text"] = "digits",
    widths: str = "4,16,64,256",
    temperature: Temperature = "batch-size",
    temperatures: str = "",
    batch_size: Annotated[int, Range(1, 2**20)] = 128,
    rate: Annotated[float, Range(0, 100)] = 0.0,
    seeds: Annotated[int, Range(2, 100)] = 2,
    epochs: Annotated[int, Range(1, 100_000)] = 60,
    noise: Annotated[float, Range(0, 1)] = 0.1,
    products: Annotated[int, Range(1, 100_000)] = 100,
    curve_epochs: Annotated[int, Range(0, 100_000)] = 100,
    high: Annotated[float, Range(0, 1, above=True)] = 0.10,
    near: Annotated[float, Range(0, 1, above=True)] = 0.05,
) -> Result:
    """Load and temperature of a training recipe, and its phase, from four measurements over a small zoo.

    Each cell of the map is a width (load: the fewer numbers, the more each has to learn) and a temperature (noise of
    training: small batches, or large steps), trained from several seeds. Measured are its training loss, the largest
    eigenvalue of the loss' Hessian, the mode connectivity of two seeds, and how alike they answer; from these a cell is
    under-fitted, under-sized, over-fitted or generalising (Schürholt et al. 2025; Yang et al. 2021, arXiv:2107.11228).
    What a library offers of it, for models and recipes of one's own, is in `transect.studies.catalog.model_zoo_phases`.

    task: `digits`, networks with two hidden layers on images of 8 x 8; `text`, Llamas of two blocks on bytes.
    widths: numbers with commas in between; of `text` multiples of 4.
    temperature: what it is, `batch-size` or `learning-rate`.
    temperatures: its values, in any order; default 8,32,128,512, or 0.01,0.03,0.1,0.3.
    batch_size: where the learning rate is the temperature.
    rate: the largest, where the batch size is the temperature; 0 for the task's own (0.03 for digits, 0.003 for text).
    seeds: models of a cell. All pairs of them are compared.
    epochs: passes over the training data; the zoo's 150 take their time.
    noise: share of the training labels that are wrong, so that fitting them all is over-fitting.
    products: with the Hessian, at most, for an eigenvalue and for a trace; their stop rules may need fewer.
    curve_epochs: passes over the training data for the curve between two seeds. The zoo has 10, which are 3,900 steps
        there and 120 on digits: too few to tell a barrier from a curve that is not trained yet.
    high: a training loss above this share of the initial loss is high.
    near: an mc of no more than this share of the initial loss is near 0.
    """
    material = MATERIALS[task](noise, bench.seed)
    loads = numbers(NAME, "widths", widths, int, 1)
    asked = temperatures or TEMPERATURES[temperature]
    if temperature == "batch-size":
        hot: list[float] = [*reversed(numbers(NAME, "temperatures", asked, int, 1))]  # from cold to hot
    else:
        hot = numbers(NAME, "temperatures", asked, float, SLOWEST)
    for size in hot if temperature == "batch-size" else [batch_size]:
        refuse_batch(int(size), material)
    for width in loads:
        material.build(width, bench.seed)
    made = phase_map(
        recipe(material, temperature, batch_size, rate, epochs, products, curve_epochs, bench.device), loads, hot,
        range(bench.seed, bench.seed + seeds), once=bench.once, progress=bench.progress,
    )  # fmt: skip
    placed = made.placed(high=high, near=near)
    axes = ("width", "temperature", "place")
    quantities = {
        name: Quantity(values, axes[: values.dim()], *ABOUT[name]) for name, values in made.figures.items()
    }  # fmt: skip
    found = torch.tensor([[PHASES.index(one.phase) for one in row] for row in placed])
    quantities["phase"] = Quantity(found, axes[:2], "", f"phase: 0 to {len(PHASES) - 1} are {', '.join(PHASES)}")
    findings, caveats = told(made, placed, temperature, noise)
    labels = {"width": list(map(str, loads)), "temperature": [f"{one:g}" for one in hot], "phase": list(PHASES)}
    return Result(quantities, findings, caveats, labels)


def phases_of(result: Result) -> list[list[str]]:
    """The names of the phases on a result's map, width by width."""
    numbers: Tensor = result["phase"]
    return [[PHASES[number] for number in row] for row in numbers.tolist()]
