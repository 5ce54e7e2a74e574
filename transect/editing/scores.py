"""How well facts were edited, and what became of others.

Source of the scores: Hase et al., arXiv:2301.04213, section 5, as in the released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from typing import NamedTuple

import torch
from torch import Tensor

from ..data import Passage, Specimen
from ..evaluation import says
from ..forward import answer_log_probabilities
from .contexts import Rows, rows_of
from .problems import Request


def measure(specimen: Specimen) -> dict[str, float]:
    """For an edit's card: how the specimen's facts, their paraphrases and their neighbours are answered.

    Means over questions; what is about new answers counts only facts with one. Probabilities are teacher-forced.
    Generated is an answer that the model, writing greedily from the prompt alone, writes itself (`evaluation.says`): a
    new answer can be more probable than the true one while the model writes neither. Neighbours whose prompt is itself
    edited are left out.
    """
    facts = specimen.facts
    edited = {fact.text for fact in facts}
    true = [(Passage(fact.text, fact.answer), fact.new_answer) for fact in facts]
    reworded = [(Passage(prompt, fact.answer), fact.new_answer) for fact in facts for prompt in fact.paraphrases]
    near = dict.fromkeys(one for fact in facts for one in fact.neighbours if one.prompt not in edited)
    kinds = {
        "true answer": [one for one, _ in true],
        "true answer, paraphrases": [one for one, _ in reworded],
        "new answer": [Passage(one.prompt, new) for one, new in true if new],
        "new answer, paraphrases": [Passage(one.prompt, new) for one, new in reworded if new],
        "neighbours' answers": list(near),
    }
    asked = list(dict.fromkeys(one for questions in kinds.values() for one in questions))
    pairs = [(specimen.encode(one.prompt), specimen.continuation(one.prompt, one.answer)) for one in asked]
    chance = dict(zip(asked, answer_log_probabilities(specimen.model, pairs).tolist(), strict=True))
    said = dict(zip(asked, says(specimen, asked), strict=True))
    above = [[chance[Passage(one.prompt, new)] > chance[one] for one, new in some if new] for some in (true, reworded)]
    found = {
        "probability of the true answer": [exp(chance[one]) for one in kinds["true answer"]],
        "probability of the new answer": [exp(chance[one]) for one in kinds["new answer"]],
        "new answer above the true one": above[0],
        "new answer above the true one, paraphrases": above[1],
        "probability of the neighbours' answers": [exp(chance[one]) for one in kinds["neighbours' answers"]],
        **{f"generated: {kind}": [said[one] for one in questions] for kind, questions in kinds.items()},
    }
    return {name: sum(each) / len(each) for name, each in found.items() if each}


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
