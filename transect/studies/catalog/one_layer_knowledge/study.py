"""The study: multiplicities x fine-tuned subjects x ways of fine-tuning x seeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from ....errors import TransectError
from ....parameters import Range
from ....probes import Quantity, Result
from ...numbers import numbers
from ...registry import Bench, studying
from .asking import PARTS, POINTS, Asking
from .drawn import draw
from .facts import Facts, side_by_side, told
from .layer import OneLayer, joined
from .learning import FULL, LOW_RANK, PRETRAINING, Steps, fit
from .measures import KINDS, error_bound, mean_loss
from .told import findings

Layer = Literal["whole", "no-mlp", "uniform-attention"]
Count = Annotated[int, Range(1, 1_000_000)]


@studying("one-layer-knowledge", title="Facts that questions reach", paper="arXiv:2508.00901", draw=draw,
          files=("facts.txt",))  # fmt: skip
def one_layer_knowledge(
    bench: Bench,
    *,
    subjects: Annotated[int, Range(2, 10_000)] = 100,
    attributes: Annotated[int, Range(1, 16)] = 2,
    templates: Annotated[int, Range(1, 256)] = 8,
    multiplicity: str = "1,2,4,8",
    fine_tuned: str = "2,8,32,64",
    rank: str = "0,1",
    seeds: Annotated[int, Range(1, 32)] = 3,
    layer: Layer = "whole",
    width: Annotated[int, Range(2, 1024)] = 48,
    neurons: Annotated[int, Range(1, 4096)] = 192,
    steps: Count = PRETRAINING.count,
    full_steps: Count = FULL.count,
    low_rank_steps: Count = LOW_RANK.count,
) -> Result:
    """When facts learned in pretraining can still be asked for after fine-tuning on questions about other subjects.

    Xu and Chen 2025, arXiv:2508.00901: a transformer of one layer is trained on statements (subject, template,
    answer), each fact in K of its attribute's |R| templates, then fine-tuned on questions (subject, question token,
    answer) about N_f subjects, and asked about the others. Their claim: extraction works where the fine-tuned facts
    cover enough templates, so it grows with K and N_f and falls with |R|; otherwise facts are stored and unreachable.
    Model, data and rates are our design (their equations could not be read): see `OneLayer`, `Facts` and `Steps`.
    All models of a multiplicity are pretrained together, and all models fine-tuned together; data and starts of a
    seed are the same at every multiplicity. Axes of the result: answer, rank, tuned, multiplicity, seed.

    subjects: how many are known.
    attributes: facts of a subject; with one, questions show nothing.
    templates: of each attribute, |R|.
    multiplicity: in how many of them a fact is told, K; several with commas.
    fine_tuned: subjects that questions are trained on, N_f; several with commas.
    rank: of fine-tuning on q, k, v and the MLP's first matrix, 0 for all parameters; several with commas.
    seeds: data and starts to average over.
    layer: whole, without an MLP, or with attention fixed to the mean of both tokens, in pretraining and afterwards.
    width: of the stream, d.
    neurons: of the MLP.
    steps: of pretraining, on all statements each.
    full_steps: of fine-tuning all parameters.
    low_rank_steps: of fine-tuning low-rank factors, at ten times the rate.
    """
    counts, tuned, ranks = (
        numbers("one-layer-knowledge", name, text, int, low)
        for name, text, low in (("multiplicity", multiplicity, 1), ("fine_tuned", fine_tuned, 1), ("rank", rank, 0))
    )
    facts = [Facts(subjects, attributes, templates, bench.seed + number) for number in range(seeds)]
    for count in counts:
        facts[0].statements(count)
    for count in tuned:
        facts[0].split(count)
    if max(ranks) > width:
        raise TransectError(f"rank {max(ranks)}: the matrices have rank {width} at most; lower it, or raise width")
    bench.write("facts.txt", told(facts[0], max(counts), max(tuned)))
    asking, uniform = Asking(facts, counts), layer == "uniform-attention"

    def pretrained(count: int) -> Mapping[str, Tensor]:
        neurons_ = 0 if layer == "no-mlp" else neurons
        model = OneLayer(facts[0].vocabulary, [one.seed for one in facts], width, neurons_, uniform).to(bench.device)
        rows = side_by_side([one.statements(count) for one in facts])
        fit(model, rows, Steps(steps, PRETRAINING.lr), f"multiplicity {count}", progress=bench.progress)
        return model.state_dict() | {"loss": mean_loss(model, rows)}

    states = [bench.once(f"pretrained-{count}", lambda count=count: pretrained(count)) for count in counts]
    losses = torch.stack([state.pop("loss") for state in states])
    model = joined(states).to(bench.device)
    before = [bench.once(f"before-{count}", lambda count=count: asking.before(model, count)) for count in tuned]
    budgets = [Steps(low_rank_steps, LOW_RANK.lr) if one else Steps(full_steps, FULL.lr) for one in ranks]
    after = [
        [
            bench.once(f"after-{one}-{count}", lambda one=one, budget=budget, count=count: asking.after(
                model, count, one, budget, bench.progress
            ))
            for count in tuned
        ]
        for one, budget in zip(ranks, budgets, strict=True)
    ]  # fmt: skip
    parts = stored_parts(asking, model)
    labels = {
        "multiplicity": counts, "tuned": tuned, "seed": [one.seed for one in facts], "answer": KINDS,
        "rank": [f"rank {one}" if one else "all parameters" for one in ranks], "part": list(PARTS),
        "matrix": model.watched, "point": [f"{100 * point // POINTS}%" for point in range(POINTS + 1)],
    }  # fmt: skip
    result = Result(
        quantities(facts, counts, tuned, losses, parts, before, after), [], caveats(attributes),
        {axis: [str(one) for one in entries] for axis, entries in labels.items()},
    )  # fmt: skip
    result.findings = findings(result)
    return result


def stored_parts(asking: Asking, model: OneLayer) -> Tensor:
    """Right answers behind own templates at the pretrained weights, whole and without a part (PARTS, K, S)."""
    everyone = [None] * len(asking.facts)
    return torch.stack([asking.own_templates(model, everyone, **off).mean(-1) for off in PARTS.values()])


def quantities(
    facts: list[Facts], counts: list[int], tuned: list[int], losses: Tensor, stored: Tensor,
    before: list[dict[str, Tensor]], after: list[list[dict[str, Tensor]]],
) -> dict[str, Quantity]:  # fmt: skip
    """The arrays of the result. before: by tuned. after: by rank and tuned."""
    cell = ("tuned", "multiplicity", "seed")

    def early(name: str) -> Tensor:
        """(first, tuned, K, S)"""
        return torch.stack([one[name] for one in before], 1)

    def late(name: str) -> Tensor:
        """(rank, tuned, ..., K, S)"""
        return torch.stack([torch.stack([one[name] for one in row]) for row in after])

    coverage = [[[one.coverage(count, number) for one in facts] for count in counts] for number in tuned]
    bound = [[error_bound(number, count, facts[0].templates) for count in counts] for number in tuned]
    found: dict[str, tuple[Any, tuple[str, ...], str, str]] = {
        "pretraining_loss": (losses, cell[1:], "nats", "mean loss of statements after pretraining"),
        "stored": (stored, ("part", *cell[1:]), "share", "told right behind own templates, pretrained"),
        "coverage": (torch.tensor(coverage), cell, "share", "an attribute's templates that fine-tuned subjects cover"),
        "bound": (torch.tensor(bound, dtype=torch.float64), cell[:2], "", "form of the paper's bound; a trend line"),
        "before": (early("kinds"), ("answer", *cell), "share", "answers to held-out questions, pretrained"),
        "gradient_share": (early("share"), ("matrix", *cell), "share", "energy of the first step's top direction"),
        "gradient_input": (early("input"), ("matrix", *cell), "", "its input side within the questions' embeddings"),
        "after": (late("kinds").movedim(2, 0), ("answer", "rank", *cell), "share", "answers to held-out questions"),
        "learned": (late("learned"), ("rank", *cell), "share", "fine-tuned questions answered right"),
        "kept": (late("kept"), ("rank", *cell), "share", "held-out facts told right behind own templates, fine-tuned"),
        "unreachable": (late("unreachable"), ("rank", *cell), "share", "held-out facts right so, wrong for a question"),
        "parts": (late("parts").movedim(2, 0), ("part", "rank", *cell), "share", "held-out questions right"),
        "course": (late("course"), ("rank", "tuned", "point", *cell[1:]), "share", "held-out questions right so far"),
    }  # fmt: skip
    full = next((row for row in after if "change" in row[0]), None)
    if full is not None:
        change = torch.stack([one["change"] for one in full], 1)
        about = "the first step's input side within the change of the questions' embeddings, all parameters"
        found["gradient_change"] = (change, ("matrix", *cell), "", about)
    return {name: Quantity(*one) for name, one in found.items()}


def caveats(attributes: int) -> list[str]:
    """What the numbers do not mean."""
    said = [
        "The bound is drawn as a trend line. It was proved for a model and data whose details could not be read, under "
        "regularity assumptions (nearly orthogonal embeddings, sizes) that these models need not meet.",
        "Parametrisation, data and rates are ours. The budget of steps is fixed and nothing is stopped early, so more "
        "fine-tuned subjects are also more to overfit; see the plots of the course.",
        "A model that knows the subject and not the attribute that is asked for is right in one of so many cases as "
        f"there are attributes ({1 / attributes:.2f} here).",
        "Two tokens and one layer: what holds here is a hypothesis about a large model, and no measurement of it.",
    ]  # fmt: skip
    if attributes == 1:
        said.insert(0, "With one attribute the answer is a function of the subject alone, and a question token that "
                    "was never trained can already reach it: these numbers show nothing. Use two or more.")  # fmt: skip
    return said
