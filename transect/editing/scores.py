"""How well facts were edited, and what became of others.

Source of the scores: Hase et al., arXiv:2301.04213, section 5, as in the released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..data import Specimen
from ..forward import answer_log_probabilities, next_logits
from .contexts import Rows, rows_of
from .problems import Request


def measure(specimen: Specimen) -> dict[str, float]:
    """For an edit's card: how the specimen's facts, their paraphrases and their neighbours are answered.

    Means over facts; shares count only facts with a new answer. Neighbours whose prompt is itself edited are left out.
    """
    facts = specimen.facts
    edited = {fact.text for fact in facts}
    near = dict.fromkeys(one for fact in facts for one in fact.neighbours if one.prompt not in edited)
    reworded = [(fact, prompt) for fact in facts for prompt in fact.paraphrases]
    changing = [fact for fact in facts if fact.new_answer]
    found = {"probability of the true answer": _mean(specimen, [(fact.text, fact.answer) for fact in facts])}
    if changing:
        found["probability of the new answer"] = _mean(specimen, [(f.text, f.new_answer or "") for f in changing])
        found["new answer above the true one"] = _above(specimen, [(f.text, f.answer, f.new_answer) for f in changing])
        if any(fact.new_answer for fact, _ in reworded):
            found["new answer above the true one, paraphrases"] = _above(
                specimen, [(prompt, f.answer, f.new_answer) for f, prompt in reworded if f.new_answer]
            )
    if near:
        found["probability of the neighbours' answers"] = _mean(specimen, [(one.prompt, one.answer) for one in near])
        said = next_logits(specimen.model, [specimen.encode(one.prompt) for one in near]).argmax(1)
        right = [int(specimen.continuation(one.prompt, one.answer)[0]) for one in near]
        found["neighbours answered"] = float((said == torch.tensor(right)).double().mean())
    return found


class Probabilities(NamedTuple):
    """Of the answers that an edit is about, on their prompts (N) and on paraphrases, and of the neighbours' answers."""

    rewrite: Tensor
    paraphrase: Tensor
    neighbour: Tensor


def probabilities(specimen: Specimen, wanted: Sequence[Request]) -> Probabilities:
    """Before or after an edit. With noise in the requests (forcing), on the prompts the mean under that noise."""
    edited = {request.fact.text for request in wanted}
    reworded = [(specimen.encode(prompt), one.target) for one in wanted for prompt in one.fact.paraphrases]
    near = dict.fromkeys(one for r in wanted for one in r.fact.neighbours if one.prompt not in edited)
    others = [(specimen.encode(one.prompt), specimen.continuation(one.prompt, one.answer)) for one in near]
    if wanted[0].noise is None:
        rewrite = answer_log_probabilities(specimen.model, [(one.prompt, one.target) for one in wanted]).exp()
    else:
        rewrite = torch.stack([_noisy(specimen, rows_of(specimen, [one], [])) for one in wanted])
    return Probabilities(rewrite, *(answer_log_probabilities(specimen.model, x).exp() for x in (reworded, others)))


@torch.no_grad()
def _noisy(specimen: Specimen, rows: Rows) -> Tensor:
    return rows.answer_log_probabilities(rows.logits(specimen)).double().exp().mean().cpu()


def scores(before: Probabilities, after: Probabilities, lowers: bool) -> dict[str, float]:
    """The study's scores, means over prompts; one without prompts is left out.

    Rewrite and paraphrase score: the share of what was missing to probability 1 (to 0, where it is to fall) that the
    edit brought, at least 0. Neighbourhood score: 1 less the change of the probability of a neighbour's own answer, as
    a share of the largest possible one.
    """
    found = {
        "rewrite score": rewrite_score(before.rewrite, after.rewrite, lowers),
        "paraphrase score": rewrite_score(before.paraphrase, after.paraphrase, lowers),
        "neighbourhood score": neighbourhood_score(before.neighbour, after.neighbour),
    }
    return {name: round(float(each.mean()), 4) for name, each in found.items() if len(each)}


def rewrite_score(before: Tensor, after: Tensor, lowers: bool = False) -> Tensor:
    """max(0, 1 - (1 - p') / (1 - p)); for an erasure max(0, (p - p') / p). Elementwise; 0 where nothing was missing."""
    missing, left = (before, after) if lowers else (1 - before, 1 - after)
    return torch.where(missing > 0, 1 - left / missing.clamp_min(1e-300), 0).clamp_min(0)


def neighbourhood_score(before: Tensor, after: Tensor) -> Tensor:
    """1 - |p' - p| / (1/2 + |p - 1/2|), elementwise."""
    return 1 - (after - before).abs() / (0.5 + (before - 0.5).abs())


def _pairs(specimen: Specimen, asked: Sequence[tuple[str, str]]) -> Tensor:
    pairs = [(specimen.encode(prompt), specimen.continuation(prompt, answer)) for prompt, answer in asked]
    return answer_log_probabilities(specimen.model, pairs)


def _mean(specimen: Specimen, asked: Sequence[tuple[str, str]]) -> float:
    return float(_pairs(specimen, asked).exp().mean())


def _above(specimen: Specimen, asked: Sequence[tuple[str, str, str | None]]) -> float:
    old = _pairs(specimen, [(prompt, true) for prompt, true, _ in asked])
    new = _pairs(specimen, [(prompt, new or "") for prompt, _, new in asked])
    return float((new > old).double().mean())
