"""Claims of causal tracing (Meng et al., NeurIPS 2022, arXiv:2202.05262)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...data import Specimen
from ...probes.tracing import Kind, answered, embedding_deviation, trace
from ..context import Context
from ..registry import NotApplicable, Result, Verdict, claim

_PAPER = "arXiv:2202.05262"
_FACTS = 50


@claim(
    "causal-trace/early-site",
    method="causal-trace",
    paper=_PAPER,
    statement="After noise on the subject, restoring one MLP output brings a fact back more at the subject's last "
    "token than at the prompt's last token.",
)
def early_site(context: Context) -> Result:
    """At the layer that is best for each of the two tokens, one layer at a time."""
    return _compared(context.specimen, "mlp", "the subject's last token", "the prompt's last token")


@claim(
    "causal-trace/late-site",
    method="causal-trace",
    paper=_PAPER,
    statement="After noise on the subject, restoring one attention output brings a fact back more at the prompt's last "
    "token than at the subject's last token.",
)
def late_site(context: Context) -> Result:
    """At the layer that is best for each of the two tokens, one layer at a time."""
    return _compared(context.specimen, "attention", "the prompt's last token", "the subject's last token")


def _compared(specimen: Specimen, kind: Kind, better: str, worse: str) -> Result:
    specimen.require_causal()
    known = answered(specimen, specimen.facts, _FACTS)
    scale = embedding_deviation(specimen)
    traces = [trace(specimen, fact, kind=kind, seed=specimen.seed, scale=scale) for fact in known]
    traces = [one for one in traces if one.subject[1] < len(one.effects)]
    if len(traces) < 2:
        raise NotApplicable("it needs two facts whose subject does not end the prompt")
    effects = {
        "the subject's last token": torch.stack([one.effects[one.subject[1] - 1] for one in traces]),
        "the prompt's last token": torch.stack([one.effects[-1] for one in traces]),
    }
    rows, best = [], {}
    for name, values in effects.items():
        layer = int(values.mean(0).argmax())
        best[name] = values[:, layer]
        for number, column in enumerate(values.T):
            mean, error = _mean_and_error(column)
            rows.append({"restored": kind, "token": name, "layer": number, "effect": mean, "standard error": error})
    difference, error = _mean_and_error(best[better] - best[worse])
    holds = difference > 2 * error
    clean, corrupted = (sum(getattr(one, name) for one in traces) / len(traces) for name in ("clean", "corrupted"))
    return Result(
        Verdict.of(holds),
        f"{len(traces)} known facts, p(answer) {clean:.3f} clean and {corrupted:.3f} with noise. The best layer gains "
        f"{best[better].mean():.3f} at {better} and {best[worse].mean():.3f} at {worse}: a difference of "
        f"{difference:+.3f} ± {error:.3f} (standard error over facts).",
        rows,
    )


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std() / len(values) ** 0.5)
