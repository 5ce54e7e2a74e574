"""ROME: a fact rewritten by a rank-one change of one down-projection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from ...data import Specimen
from ...parameters import Range
from ..closed_form import rank_one, refuse_short_text, second_moments
from ..contexts import prefixes_of, rows_of
from ..journal import Journal
from ..places import down_of, usual_layer
from ..problems import Problem, Request, fulfilled, requests
from ..registry import editing
from ..scores import measure, probabilities, scores
from ..values import Search, values


def check(specimen: Specimen, *, problem: Problem, layer: int, noise: float, **others: Any) -> None:
    requests(specimen, problem, noise)
    refuse_short_text(specimen, down_of(specimen, usual_layer(specimen) if layer < 0 else layer))


@editing("rome", paper="arXiv:2202.05262", measure=measure, check=check, of_facts=True)
def rome(
    specimen: Specimen,
    journal: Journal,
    *,
    problem: Problem = "injection",
    layer: Annotated[int, Range(-1, 1000)] = -1,
    contexts: Annotated[int, Range(0, 200)] = 10,
    steps: Annotated[int, Range(1, 1000)] = 40,
    learning_rate: Annotated[float, Range(1e-6, 10)] = 0.03,
    drift: Annotated[float, Range(0, 100)] = 0.0625,
    decay: Annotated[float, Range(0, 100)] = 0.5,
    longest: Annotated[float, Range(0.01, 100)] = 4.0,
    protect: Annotated[float, Range(0, 1e6)] = 0.05,
    rounds: Annotated[int, Range(1, 100)] = 3,
    noise: Annotated[float, Range(0, 100)] = 3.0,
) -> dict[str, Any]:
    """Rewrite facts one after the other, each by a rank-one change of one layer's down-projection.

    With k the input of W at the subject's last token, k* its mean over contexts, C = E[k kᵀ] over the specimen's text,
    and v* an output at which the model gives the wanted answer: W becomes W + (v* - W k - b) uᵀ / (uᵀ k), u along
    C⁻¹ k*. Of all W' with W' k = v* it moves the outputs on the text least, where k = k*. Keys and outputs of each fact
    are those of the model with the earlier facts already in it. C is that of the model before.

    The contexts are beginnings of the specimen's text rather than sentences that the model makes up (ours). With noise
    on the subject (forcing) the contexts are the prompt under each draw of it (ours).

    problem: what is to become of the facts: a new answer (injection), what the model says when noise lies on the
        subject (reversal), the true answer made improbable (erasure), more probable (amplification), or probable
        although noise lies on the subject (forcing).
    layer: whose down-projection is changed, from 0; -1 for the one just below a third of the way up (ours): ROME has
        17 of GPT-2 XL's 48, 8 of GPT-2 medium's 24 and 5 of GPT-J's 28.
    contexts: texts that are put before the prompt, in turn five and ten tokens long, beside the prompt alone (ours;
        ROME has 20, ten of each length).
    steps: of Adam in search of v* (ours; ROME takes 20).
    learning_rate: of Adam, in root mean squares of m's entries (ours). The papers take steps of 0.5 without a unit,
        which in a small model leads at once to the longest change that is allowed.
    drift: weight of KL(edited || original) of what the model says after the subject alone; ROME's.
    decay: weight of the length of v* - m over the square of m's, m being the output before; ROME's.
    longest: how long v* - m may be, in lengths of m; ROME's (3 for GPT-2 medium).
    protect: how much the key of a fact already written counts in C, the text as a whole counting 1 (ours); 0 for ROME
        applied again and again, as published.
    rounds: after all facts were written, those that later ones have overwritten are written again, in so many rounds
        with the first one (ours); 1 for ROME as published.
    noise: on the subject, in standard deviations of the embeddings (reversal, forcing); three, as in ROME's tracing.
    """
    layer = usual_layer(specimen) if layer < 0 else layer
    matrix = down_of(specimen, layer)
    wanted = requests(specimen, problem, noise)
    search = Search(steps, learning_rate, drift, decay, longest, problem == "erasure")
    prefixes = prefixes_of(specimen, contexts)
    (moments,) = second_moments(specimen, [matrix])
    before = probabilities(specimen, wanted)
    rewrite(specimen, journal, wanted, layer, moments, prefixes, search, protect, rounds)
    return {"layer": layer, "facts": len(wanted), **scores(before, probabilities(specimen, wanted), search.lowers)}


def rewrite(
    specimen: Specimen, journal: Journal, wanted: Sequence[Request], layer: int, moments: Tensor,
    prefixes: Sequence[str], search: Search, protect: float, rounds: int,
) -> None:  # fmt: skip
    """Write the requests into one layer, one after the other. moments: C of its down-projection; prefixes: contexts."""
    matrix = down_of(specimen, layer)
    written: dict[int, Tensor] = {}  # keys, by the number of the request; a layer's keys do not depend on its own W
    for turn in range(rounds):
        todo = [number for number, one in enumerate(wanted) if turn == 0 or not fulfilled(specimen, one)]
        for number in specimen.shown(todo, "facts"):
            rows = rows_of(specimen, [wanted[number]], prefixes, essence=search.drift > 0)
            change, _ = values(specimen, rows, "down", layer, search)
            (keys,) = rows.at_edit(specimen, [("neurons", layer)])
            key = rows.bare(keys)[0]
            others = [one for other, one in written.items() if other != number]
            around = moments
            if others:
                stack = torch.stack(others)
                around = moments + protect * stack.T @ stack
            journal.add(matrix, *rank_one(change[0], around, rows.in_context(keys)[0], key))
            written[number] = key
