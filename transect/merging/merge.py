"""Several models, one way to merge them: check, merge, measure."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..anatomy import Anatomy, record_of
from ..data import Batches
from ..errors import TransectError
from ..evaluation import evaluate_loss
from ..forward import at_rest
from ..statistics import Progress
from ..version import __version__
from .curve import Curve, curve_of
from .fit import refuse_other_words, refuse_unfit
from .registry import Given, merging_named, write_tensors

Files = dict[str, Callable[[Path], None]]


def merge_models(
    models: Sequence[Anatomy],
    name: str,
    settings: Mapping[str, Any],
    *,
    base: Anatomy | None = None,
    names: Sequence[str] = (),
    tokenizers: Sequence[Any] = (),
    curve: Batches | None = None,
    points: int = 11,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Any, dict[str, Any], Files]:
    """A new model from two or more that fit, what came of it, and what else belongs into its folder.

    names, tokenizers: of the models, and of the base behind them. curve: held-out text on which the models, the result
    and the straight lines between the first two are measured, at so many points.

    The outcome has `method`, `settings`, `models` (their names), `told` (what the method says, words and a number), and
    with a curve `losses` (by model, in nats) and `curves` (of the first two models "as they are" and "aligned": shares,
    losses, barrier). TransectError before any work if something does not fit; the given models stay as they are.
    """
    chosen = merging_named(name)
    complete = chosen.settings(settings)
    if len(models) < 2:
        raise TransectError("merging takes two models or more")
    if chosen.needs_base and base is None:
        raise TransectError(f"{name} needs the model that the others were trained from: pass base= (--base)")
    if base is not None and not chosen.needs_base:
        raise TransectError(f"{name} has no use for a base: leave it out")
    every = [*models, *([] if base is None else [base])]
    called = list(names) or [f"model {number + 1}" for number in range(len(models))] + ["the base"] * (base is not None)
    refuse_unfit(every, called)
    if tokenizers:
        refuse_other_words(tokenizers, called)
    given = Given(list(models), base, seed, progress)
    if chosen.check is not None:
        chosen.check(given, **complete)
    with at_rest(*(one.model for one in every), frozen=True):
        values = chosen.function(given, **complete)
        made = copy.deepcopy(models[0].model)
        write_tensors(made, values)
        Anatomy(made, models[0].architecture).check_finite()
        outcome: dict[str, Any] = {
            "method": name, "settings": complete, "models": called[: len(models)],
            "base": None if base is None else called[-1], "told": given.told,
        }  # fmt: skip
        if curve is not None:
            outcome |= _measured(given, made, called, curve, points, progress)
    record_of(made).history.append({"transect": __version__, "merge": outcome})
    return made, outcome, given.files


def _measured(
    given: Given, made: Any, called: Sequence[str], batches: Batches, points: int, progress: Progress | None
) -> dict[str, Any]:
    lines = {"as they are": curve_of(given.models[0], given.models[1], batches, points, progress)}
    if given.aligned:
        lines["aligned"] = curve_of(given.models[0], given.aligned[0], batches, points, progress)
    ends = lines["as they are"].losses
    losses = [(called[0], ends[0]), (called[1], ends[-1])]
    for anatomy, name in zip(given.models[2:], called[2:], strict=False):
        losses.append((name, evaluate_loss(anatomy.model, batches).loss))
    losses.append(("merged", evaluate_loss(made, batches).loss))
    return {
        "losses": [list(one) for one in losses],
        "curves": {name: _described(curve) for name, curve in lines.items()},
        "data": batches.fingerprint,
    }


def _described(curve: Curve) -> dict[str, Any]:
    return {**asdict(curve), "barrier": curve.barrier}
