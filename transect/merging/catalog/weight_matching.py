"""Permutation alignment of trained models, and their mean."""

from __future__ import annotations

import copy

from torch import Tensor

from ...anatomy import Anatomy
from ..check import changed_by
from ..matching import distance, match
from ..registry import Given, merging, tensors_of
from ..shares import mean_of, shares_of
from ..units import refuse_unmatchable, units_of


def _check(given: Given, *, weights: str) -> None:
    shares_of(weights, len(given.models), "weight-matching")
    for number, anatomy in enumerate(given.models):
        refuse_unmatchable(anatomy, f"model {number + 1}")


@merging("weight-matching", paper="arXiv:2402.04051", check=_check)
def weight_matching(given: Given, *, weights: str = "") -> dict[str, Tensor]:
    """Re-order the units of the other models so that they lie beside the first, and take the mean.

    For models of one shape from different seeds. Neurons, heads within key/value groups, channels within heads and the
    residual stream of each other model are permuted, which changes nothing of its function, to maximise ⟨θ_A, P(θ_B)⟩
    by coordinate ascent with exact assignments (Ainsworth et al. 2023, arXiv:2209.04836, algorithm 1; heads and the
    channels within them are our extension). Several models are all matched to the first. No data are needed.

    weights: a number for each model, such as 0.7,0.3; they add up to 1. Default: equal.
    """
    first = given.models[0]
    start = tensors_of(first.model)
    models = [start]
    for number, other in enumerate(given.models[1:], 2):
        moved = Anatomy(copy.deepcopy(other.model), first.architecture)
        done = match(units_of(first, moved), given.generator, progress=given.progress)
        behind = tensors_of(moved.model)
        which = f", model {number}" if len(given.models) > 2 else ""
        given.told |= {
            f"distance from the first model{which}": distance(start, tensors_of(other.model)),
            f"the same, aligned{which}": distance(start, behind),
            f"sweeps over the units{which}": float(done.sweeps),
            f"orders changed{which}": float(done.changed),
            f"largest change of an output by the alignment, of the largest output{which}": changed_by(other, moved),
        }
        given.aligned.append(moved)
        models.append(behind)
    return mean_of(models, shares_of(weights, len(models), "weight-matching"))
