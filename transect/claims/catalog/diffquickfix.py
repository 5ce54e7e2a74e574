"""Claims of Diff-QuickFix (Basu et al., ICLR 2024, arXiv:2310.13730), where there are no images to look at."""

from __future__ import annotations

from dataclasses import replace

import torch

from ...data import Fact, Specimen
from ...editing import Journal
from ...editing import edit as registered
from ...editing.catalog.diffquickfix.captions import embeddings, refuse_other_models, whole
from ..context import Context
from ..registry import NotApplicable, Result, Verdict, claim

NAME, FACTS = "diffquickfix", 20
_PAPER = "arXiv:2310.13730"


def _bench(context: Context) -> tuple[Specimen, list[Fact]]:
    specimen = context.fresh()
    refuse_other_models(specimen)
    specimen.model.eval().requires_grad_(False)
    facts = [fact for fact in specimen.facts if fact.new_answer and fact.neighbours][-FACTS:]
    if not facts:
        raise NotApplicable("none of the facts has both a new_answer and neighbours")
    return specimen, facts


def _edited(specimen: Specimen, fact: Fact, layer: int, size: float | None = None) -> dict[str, float]:
    """One fact edited and taken back. size: ||ΔW|| to which the change is brought first, or None."""
    one = replace(specimen, known_facts=[fact])
    asked, meaning = whole(one, fact.text), whole(one, fact.text.replace(fact.subject, str(fact.new_answer)))
    near = [whole(one, other.prompt) for other in fact.neighbours]
    journal, matrix = Journal(one.model), one.anatomy.blocks[layer].matrix("o")
    old, before = matrix.weight.clone(), embeddings(one, [asked, meaning, *near])
    try:
        registered(NAME).function(one, journal, **registered(NAME).settings({"layer": layer}))
        change = matrix.weight - old
        if size is not None:
            journal.write(matrix, old + change * (size / float(change.norm())))
        after = embeddings(one, [asked, meaning, *near])
    finally:
        journal.undo()
    moved = 1 - torch.cosine_similarity(before, after)
    return {
        "layer": layer, "size": float(change.norm()),
        "likeness before": float(torch.cosine_similarity(before[0], before[1], 0)),
        "likeness after": float(torch.cosine_similarity(after[0], after[1], 0)),
        "phrase moved": float(moved[0]), "neighbours moved": float(moved[2:].mean()),
    }  # fmt: skip


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


@claim(
    f"{NAME}/means-the-other-phrase", method=NAME, paper=_PAPER,
    statement="After the edit the embedding of a caption with the phrase is nearer to that with the other phrase, and "
    "other captions move less.",
)  # fmt: skip
def means_the_other_phrase(context: Context) -> Result:
    """Single facts at the defaults. The embedding is the last state, see the edit."""
    specimen, facts = _bench(context)
    rows = [_edited(specimen, fact, 0) for fact in specimen.shown(facts, NAME)]
    nearer = sum(row["likeness after"] > row["likeness before"] for row in rows) / len(rows)
    less = sum(row["neighbours moved"] < row["phrase moved"] for row in rows) / len(rows)
    mean = _mean(rows)
    told = (
        f"Over {len(rows)} phrases the cosine with the other phrase goes from {mean['likeness before']:.4f} to "
        f"{mean['likeness after']:.4f} and rises for {nearer:.0%}; the phrase's caption moves by "
        f"{mean['phrase moved']:.4f} (1 - cosine), neighbours by {mean['neighbours moved']:.4f}, less for {less:.0%}."
    )
    return Result(Verdict.of(min(nearer, less) >= 0.95), told, [mean])


@claim(
    f"{NAME}/first-layer", method=NAME, paper=_PAPER,
    statement="A change of the first layer's attention moves the phrase's embedding more than one of the same size in "
    "the middle layer.",
)  # fmt: skip
def first_layer(context: Context) -> Result:
    """The paper's localization, as far as embeddings can tell. It was found in CLIP's text tower."""
    specimen, facts = _bench(context)
    middle = specimen.layers // 2
    if middle == 0:
        raise NotApplicable("the model has one layer")
    pairs = []
    for fact in specimen.shown(facts, NAME):
        size = min(_edited(specimen, fact, layer)["size"] for layer in (0, middle))
        pairs.append([_edited(specimen, fact, layer, size) for layer in (0, middle)])
    first, other = (_mean([pair[number] for pair in pairs]) for number in (0, 1))
    more = sum(one["phrase moved"] > two["phrase moved"] for one, two in pairs) / len(pairs)
    told = (
        f"At equal size layer 0 moves the caption by {first['phrase moved']:.4f} (1 - cosine) and layer {middle} by "
        f"{other['phrase moved']:.4f}, over {len(pairs)} phrases; layer 0 by more for {more:.0%}."
    )
    return Result(Verdict.of(more > 0.5), told, [first, other])
