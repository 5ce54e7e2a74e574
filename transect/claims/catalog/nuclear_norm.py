"""Claims of the matrix nuclear norm (Li et al., EMNLP Findings 2025, arXiv:2410.10672)."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from ...anatomy import Anatomy
from ...probes import Result as Found
from ...probes import run_probes
from ..context import Context
from ..registry import NotApplicable, Result, Verdict, claim

_PAPER = "arXiv:2410.10672"


@claim(
    "nuclear-norm/falls-with-training",
    method="nuclear-norm",
    paper=_PAPER,
    statement="A trained model's matrix nuclear norm is below that of the same architecture with random weights.",
)
def falls_with_training(context: Context) -> Result:
    """A model that compresses better has a lower one, by the paper, which compares sizes of a family; this is ours."""
    trained = _found(context)
    with torch.random.fork_rng():
        torch.manual_seed(context.specimen.seed)
        fresh = type(context.model)(copy.deepcopy(context.model.config)).to(context.model.device)
    random = _found(context, Anatomy(fresh))
    numbers = [
        {"figure": name, "trained": float(trained[name].nanmean()), "random": float(random[name].nanmean())}
        for name in trained.quantities
        if name != "length"
    ]
    apart = (trained["mnn"] - random["mnn"])[trained["mnn"].isfinite() & random["mnn"].isfinite()]
    if len(apart) < 2:
        raise NotApplicable("it needs at least two texts")
    difference, error = float(apart.mean()), float(apart.std() / len(apart) ** 0.5)
    shares = [float(one["nuclear_share"].nanmean()) for one in (trained, random)]
    contrary = (shares[0] - shares[1]) * difference < 0
    return Result(
        Verdict.of(difference < -2 * error),
        f"Over {len(apart)} texts the matrix nuclear norm is {float(trained['mnn'].nanmean()):.4f} trained and "
        f"{float(random['mnn'].nanmean()):.4f} random, a difference of {difference:+.4f} ± {error:.4f}; the exact "
        f"nuclear norm is {shares[0]:.1%} and {shares[1]:.1%} of its ceiling"
        + (", so what the estimate stands for moves the other way" if contrary else ""),
        numbers,
    )


@claim(
    "nuclear-norm/ranks-as-exact",
    method="nuclear-norm",
    paper=_PAPER,
    statement="Matrix nuclear norm ranks texts as the exact nuclear norm does.",
)
def ranks_as_exact(context: Context) -> Result:
    """The paper takes it as an approximation. Rank correlation over texts, each as a share of its ceiling."""
    found = _found(context)
    both = torch.stack([found["mnn_share"], found["nuclear_share"]])
    both = both[:, both.isfinite().all(0)]
    if both.shape[1] < 10:
        raise NotApplicable(f"a rank correlation of {both.shape[1]} texts says nothing: it needs 10")
    ranks = both.argsort(1).argsort(1).double()
    correlation = float(torch.corrcoef(ranks)[0, 1])
    numbers = [
        {"figure": name, "mean": float(row.mean()), "lowest": float(row.min()), "highest": float(row.max())}
        for name, row in zip(("mnn_share", "nuclear_share"), both, strict=True)
    ]
    return Result(
        Verdict.of(correlation > 0.8),
        f"Rank correlation {correlation:.2f} over {both.shape[1]} texts; above 0.8 is asked for",
        numbers,
    )


def _found(context: Context, anatomy: Anatomy | None = None) -> Found:
    """The probe's result on the calibration text, for another model of the same vocabulary if given."""
    specimen = context.specimen if anatomy is None else replace(context.specimen, anatomy=anatomy)
    inspection = run_probes(specimen, {"nuclear-norm": {}})
    if inspection.refused:
        raise NotApplicable(inspection.refused["nuclear-norm"])
    return inspection["nuclear-norm"]
