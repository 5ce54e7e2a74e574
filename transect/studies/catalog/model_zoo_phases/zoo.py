"""A map of cells: models of one recipe for each load and temperature, several seeds each, what is measured of them.

Load is what there is to learn for a number: it rises as the width falls. Temperature is the noise of training: it
rises as the batch shrinks or the rate grows.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ....errors import Diverged, TransectError
from ....statistics import Progress
from .connectivity import (
    POINTS,
    Joined,
    bezier,
    bezier_connectivity,
    check_alike,
    losses_along,
    mode_connectivity,
    straight,
)
from .hessian import hessian_trace, top_eigenvalue
from .losses import Loss, mean_loss
from .phases import HIGH, NEAR, Cell, Placed, phase_of
from .similarity import Outputs, output_similarity

Make = Callable[[], Mapping[str, Tensor]]
Once = Callable[[str, Make], Mapping[str, Tensor]]

# What is measured of a cell: its unit, and what it is.
ABOUT = {
    "initial_loss": ("nats", "mean training loss before training"),
    "training_loss": ("nats", "mean training loss"),
    "training_error": ("share", "share of the training examples that are told wrong"),
    "held_out_loss": ("nats", "mean held-out loss"),
    "held_out_error": ("share", "share of the held-out examples that are told wrong"),
    "sharpness": ("nats", "largest eigenvalue of the training loss' Hessian, by magnitude"),
    "trace": ("nats", "trace of that Hessian"),
    "held_out_sharpness": ("nats", "largest eigenvalue of the held-out loss' Hessian, by magnitude"),
    "held_out_trace": ("nats", "trace of that Hessian"),
    "connectivity": ("nats", "mc of the training loss on the trained curve between two seeds; negative: a barrier"),
    "error_connectivity": ("share", "mc of the training error on that curve"),
    "line_connectivity": ("nats", "mc of the training loss on the straight line between two seeds"),
    "matched_connectivity": ("nats", "the same line after weight matching"),
    "averaged_error": ("share", "held-out error of the average of two seeds' numbers"),
    "matched_error": ("share", "held-out error of that average after weight matching"),
    "similarity": ("", "linear CKA of two seeds' held-out outputs"),
    "debiased_similarity": ("", "the same by the unbiased estimates"),
    "curve": ("nats", "mean training loss along the trained curve"),
    "line": ("nats", "mean training loss along the straight line"),
}
_CURVES = ("curve", "line")
_CELL = ("initial_loss", "training_loss", "connectivity", "similarity", "sharpness")  # in the order of `Cell`


@dataclass(frozen=True)
class Measures:
    """What models are measured by.

    loss, error: see `Loss`; the error counts wrong answers. outputs: see `Outputs`. training, held_out: batches; the
    curves are trained on the first. curved: the training and the held-out batches for the Hessian (the zoo: 10 of 64
    each; how they are cut makes no difference), default all. products: with the Hessian, at most, for an eigenvalue and
    for a trace. curve_epochs: of training a curve. match: (a, b) -> b with its units in the order that lies closest to
    a's; without it nothing is matched.
    """

    loss: Loss
    error: Loss
    outputs: Outputs
    training: Sequence[Any]
    held_out: Sequence[Any]
    curved: tuple[Sequence[Any], Sequence[Any]] | None = None
    products: int = 100
    curve_epochs: int = 10
    match: Callable[[Any, Any], nn.Module] | None = None


@dataclass(frozen=True)
class Recipe:
    """How models of a cell are made: build(load, seed) gives an untrained one, train(model, load, temperature, seed)
    trains it in place; a `transect.errors.Diverged` from it is noted on the map. measures: see `Measures`."""

    build: Callable[[Any, int], nn.Module]
    train: Callable[[nn.Module, Any, Any, int], None]
    measures: Measures


@dataclass(frozen=True)
class PhaseMap:
    """figures: what `ABOUT` lists, each load x temperature (x t for curves); NaN where a training diverged."""

    loads: list[Any]
    temperatures: list[Any]
    figures: dict[str, Tensor]

    def cell(self, row: int, column: int) -> Cell:
        """The cell of a load and a temperature, by their places."""
        return cell_of({name: self.figures[name][row, column] for name in _CELL})

    @property
    def similar(self) -> float:
        """The median similarity of the map, above which it counts as large."""
        return float(self.figures["similarity"].flatten().nanquantile(0.5))

    def placed(self, *, high: float = HIGH, near: float = NEAR) -> list[list[Placed]]:
        """Every cell's phase, load by load; see `phase_of`."""
        rows, columns = range(len(self.loads)), range(len(self.temperatures))
        return [
            [phase_of(self.cell(row, column), self.similar, high=high, near=near) for column in columns] for row in rows
        ]


def phase_map(
    recipe: Recipe,
    loads: Sequence[Any],
    temperatures: Sequence[Any],
    seeds: Sequence[int],
    *,
    once: Once = lambda name, make: make(),
    progress: Progress | None = None,
) -> PhaseMap:
    """Train and measure every cell of the map, with any recipe.

    loads, temperatures: numbers or words that `recipe` knows, in the order of the map. seeds: two or more.
    once: (name, make) -> what make() gives, or what is kept of it under that name, such as `Bench.once`: every trained
    model and every cell goes through it, so that a map that was interrupted goes on.
    Raises TransectError, before any training, for a single seed, an empty map, or one that names a cell twice.
    """
    check_seeds(seeds)
    for axis, places in (("load", loads), ("temperature", temperatures)):
        if not places or len(set(places)) < len(places):
            raise TransectError(f"a map needs a {axis} or more, and each once; got {list(places)}")
    cells = list(itertools.product(loads, temperatures))
    found = [
        _cell(recipe, load, temperature, seeds, once)
        for load, temperature in (progress(cells, "cells of the map") if progress else cells)
    ]
    shape = len(loads), len(temperatures)
    names = dict.fromkeys([*_CELL, *(name for one in found for name in one)])
    figures = {}
    for name in names:
        missing = torch.full((POINTS,) if name in _CURVES else (), math.nan, dtype=torch.float64)
        stacked = torch.stack([one.get(name, missing) for one in found])
        figures[name] = stacked.reshape(*shape, *stacked.shape[1:])
    return PhaseMap(list(loads), list(temperatures), figures)


def cell_of(figures: Mapping[str, Tensor]) -> Cell:
    """A cell from figures by the names of `ABOUT`, such as those of `measured` with the initial loss."""
    return Cell(*(float(figures[name]) for name in _CELL))


def check_seeds(seeds: Sequence[int]) -> None:
    """TransectError unless there are two or more different ones."""
    if len(set(seeds)) < max(2, len(seeds)):
        raise TransectError(
            f"connectivity and similarity compare models of different seeds: give two seeds or more, not {list(seeds)}"
        )


def _cell(recipe: Recipe, load: Any, temperature: Any, seeds: Sequence[int], once: Once) -> Mapping[str, Tensor]:
    """Train the cell's models, and measure them; of those that diverged, only where they began."""
    place, models, by = f"{load}-{temperature}", [], recipe.measures
    for seed in seeds:
        kept = once(f"model-{place}-{seed}", lambda seed=seed: _trained(recipe, load, temperature, seed))
        if kept:
            model = recipe.build(load, seed)
            model.load_state_dict(kept)
            models.append(model)

    def measure() -> Mapping[str, Tensor]:
        before = [mean_loss(recipe.build(load, seed), by.loss, by.training) for seed in seeds]
        found = measured(models, by) if len(models) == len(seeds) else {}
        return {"initial_loss": torch.tensor(statistics.fmean(before), dtype=torch.float64), **found}

    return once(f"cell-{place}", measure)


def _trained(recipe: Recipe, load: Any, temperature: Any, seed: int) -> dict[str, Tensor]:
    """The numbers of a trained model by name; nothing where its training diverged."""
    model = recipe.build(load, seed)
    try:
        recipe.train(model, load, temperature, seed)
    except Diverged:
        return {}
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def measured(models: Sequence[nn.Module], by: Measures) -> dict[str, Tensor]:
    """All figures of `ABOUT` but the initial loss, of models of one recipe: means over models, or over pairs of them.

    They are trained already, such as checkpoints of several seeds. Scalars, and (points) for what is along a curve;
    float64.
    Raises TransectError for fewer than two models, and for models of different shapes.
    """
    if len(models) < 2:
        raise TransectError(f"connectivity and similarity compare models: give two of one recipe, not {len(models)}")
    for other in models[1:]:
        check_alike(models[0], other)
    each = [_of_one(model, by) for model in models]
    pairs = [_of_pair(*pair, by) for pair in itertools.combinations(models, 2)]
    return {
        name: torch.stack([one[name] for one in rows]).mean(dim=0) for rows in (each, pairs) for name in rows[0]
    }  # fmt: skip


def _of_one(model: nn.Module, by: Measures) -> dict[str, Tensor]:
    """Losses, errors and curvature of one model."""
    seen, unseen = by.curved or (by.training, by.held_out)
    found = {
        "training_loss": mean_loss(model, by.loss, by.training),
        "training_error": mean_loss(model, by.error, by.training),
        "held_out_loss": mean_loss(model, by.loss, by.held_out),
        "held_out_error": mean_loss(model, by.error, by.held_out),
        "sharpness": top_eigenvalue(model, by.loss, seen, steps=by.products).value,
        "trace": hessian_trace(model, by.loss, seen, probes=by.products).value,
        "held_out_sharpness": top_eigenvalue(model, by.loss, unseen, steps=by.products).value,
        "held_out_trace": hessian_trace(model, by.loss, unseen, probes=by.products).value,
    }
    return _tensors(found)


def _of_pair(first: nn.Module, second: nn.Module, by: Measures) -> dict[str, Tensor]:
    """Connectivity, averages and similarity of two models."""
    joined = bezier_connectivity(first, second, by.loss, by.training, epochs=by.curve_epochs)
    found = {
        "connectivity": joined.connectivity,
        "error_connectivity": mode_connectivity(_errors(first, second, joined, by)),
        "line_connectivity": mode_connectivity(joined.on_the_line),
        "averaged_error": _averaged(first, second, by),
        "similarity": output_similarity(first, second, by.outputs, by.held_out),
        "debiased_similarity": output_similarity(first, second, by.outputs, by.held_out, debiased=True),
    }
    if by.match is not None:
        moved = by.match(first, second)
        line = straight(_numbers(first), _numbers(moved))
        along = losses_along(line, first, by.loss, by.training)
        found["matched_connectivity"] = mode_connectivity(along)
        found["matched_error"] = _averaged(first, moved, by)
    return {**_tensors(found), "curve": joined.losses, "line": joined.on_the_line}


def _errors(first: nn.Module, second: nn.Module, joined: Joined, by: Measures) -> Tensor:
    path = bezier(_numbers(first), joined.bend, _numbers(second))
    return losses_along(path, first, by.error, by.training)


def _averaged(first: nn.Module, second: nn.Module, by: Measures) -> float:
    """The held-out error half way on the straight line."""
    line = straight(_numbers(first), _numbers(second))
    return float(losses_along(line, first, by.error, by.held_out, 3, by.training)[1])


def _numbers(model: nn.Module) -> dict[str, Tensor]:
    return {name: one.detach() for name, one in model.named_parameters()}


def _tensors(found: Mapping[str, float]) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}
