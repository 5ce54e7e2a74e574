"""Claims of the anchored-letter edit (Li and Gao, 2025, arXiv:2405.03205)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...anatomy import Matrix
from ...data import Specimen
from ...editing import Journal, edit
from ...editing.catalog.anchored_bias.anchored_bias import (
    answers,
    favoured,
    leaning_heads,
    share_of_lead,
    split,
    turn,
    turned,
)
from ...editing.catalog.anchored_bias.anchors import Leaning, leaning, letter_direction
from ...editing.catalog.anchored_bias.letters import Answers, averaged_letter_logits, items_of, letter_logits
from ...editing.catalog.anchored_bias.told import told_answers, told_neuron
from ...evaluation import evaluate_loss
from ..context import Context
from ..registry import NotApplicable, Result, Verdict, claim

PAPER = edit("anchored-bias").paper
DRAWS = 5  # of as many random neurons
CLEAR = 2  # standard errors


@claim(
    "anchored-bias/spread",
    method="anchored-bias",
    paper=PAPER,
    statement="Turning the neurons that write a favoured letter reduces the spread of accuracy over the places of the "
    "answer, on items that took no part in the choice.",
)
def spread(context: Context) -> Result:
    """With the default settings; beside it what else could be done, the same neurons silenced, and random ones."""
    specimen = context.fresh()
    settings = edit("anchored-bias").settings({})
    check = edit("anchored-bias").check
    assert check is not None
    check(specimen, **settings)
    choosing, judging = (items_of(specimen, part) for part in split(specimen))
    before = letter_logits(specimen, choosing)
    letter = favoured(before)
    found = leaning(specimen, choosing, letter)
    chosen = turned(found, settings["neurons"], settings["threshold"])
    if not chosen:
        raise NotApplicable(f"no neuron adds to {judging.letters[letter]}, the letter that is answered most often")
    plain = letter_logits(specimen, judging)
    rows: list[dict[str, Any]] = []

    def note(name: str, given: Answers) -> Answers:
        """Keep one measured variant as a row."""
        others = [number for number in range(len(judging.letters)) if number != letter]
        rows.append(
            {
                "model": name, "accuracy": given.accuracy, "spread": given.spread,
                "where_right": float(given.by_place[letter]), "where_wrong": float(given.by_place[others].mean()),
                "bias_rate": given.bias_rate(letter), "consistent": given.consistency,
                "loss": evaluate_loss(specimen.model, context.evaluation).loss,
            }
        )  # fmt: skip
        return given

    def with_weights(name: str, write: Callable[[Journal], Any]) -> Answers:
        journal = Journal(specimen.model)
        try:
            write(journal)
            return note(name, answers(letter_logits(specimen, judging), judging))
        finally:
            journal.undo()

    unedited = note("unedited", answers(plain, judging))
    towards = letter_direction(specimen.lens, choosing.tokens, letter)
    part = settings["beta"] * share_of_lead(found, chosen, before, letter)
    edited = with_weights("edited", lambda journal: turn(specimen, journal, chosen, towards, part))
    with_weights("edited, cancel all", lambda journal: turn(specimen, journal, chosen, towards, settings["beta"]))
    with_weights("neurons silenced", lambda journal: silence(specimen, journal, chosen))
    generator = torch.Generator().manual_seed(specimen.seed)
    for draw in range(DRAWS):
        others = random_neurons(found, chosen, generator)
        with_weights(f"random silenced {draw}", lambda journal, others=others: silence(specimen, journal, others))
    heads: dict[int, list[int]] = {}
    for layer, head, _ in leaning_heads(found, settings["threshold"]):
        heads.setdefault(layer, []).append(head)
    note("attention averaged", answers(averaged_letter_logits(specimen, judging, heads), judging))
    note("letters calibrated", answers(plain - before.mean((0, 1)), judging))
    neuron = told_neuron(specimen, choosing, letter, settings["threshold"])
    if neuron is not None:
        given = told_answers(specimen, judging, letter, neuron, 1.0)
        note("told the answers (upper bound)", Answers(given, judging.answers))
    change, error = spread_change(unedited, edited)
    told = (
        f"Letter {judging.letters[letter]}, favoured on {len(choosing)} items; {len(judging)} other items, each in all "
        f"{len(judging.letters)} rotations. Spread {unedited.spread:.1%} before and {edited.spread:.1%} after "
        f"({change:+.1%}, bootstrap standard error {error:.1%}), accuracy {unedited.accuracy:.1%} and "
        f"{edited.accuracy:.1%} with {1 / len(judging.letters):.0%} by chance, answered {judging.letters[letter]} "
        f"where it is wrong {unedited.bias_rate(letter):.1%} and {edited.bias_rate(letter):.1%}"
    )
    holds = change < 0
    if holds and abs(change) < CLEAR * error:
        told += f". The fall is within {CLEAR} standard errors of 0"
    return Result(Verdict.HOLDS if holds else Verdict.DOES_NOT_HOLD, told, rows)


def silence(specimen: Specimen, journal: Journal, neurons: list[tuple[int, int]]) -> None:
    """Let neurons write nothing."""
    for layer in dict.fromkeys(layer for layer, _ in neurons):
        down: Matrix = specimen.anatomy.blocks[layer].matrix("down")
        weight = down.weight.clone()
        weight[:, [neuron for one, neuron in neurons if one == layer]] = 0
        journal.write(down, weight)


def random_neurons(found: Leaning, chosen: list[tuple[int, int]], generator: torch.Generator) -> list[tuple[int, int]]:
    """As many neurons of each layer as were chosen there."""
    return [
        (layer, int(neuron))
        for layer in dict.fromkeys(layer for layer, _ in chosen)
        for neuron in torch.randperm(len(found.neurons[layer]), generator=generator)[
            : sum(one == layer for one, _ in chosen)
        ]
    ]


def spread_change(before: Answers, after: Answers, draws: int = 200) -> tuple[float, float]:
    """Change of the spread, and its standard error over items, drawn anew with replacement in pairs."""
    generator = torch.Generator().manual_seed(0)

    def changed(rows: Tensor) -> float:
        return (
            Answers(after.chosen[rows], after.right[rows]).spread
            - Answers(before.chosen[rows], before.right[rows]).spread
        )

    count = len(before.right)
    drawn = [changed(torch.randint(count, (count,), generator=generator)) for _ in range(draws)]
    return changed(torch.arange(count)), float(torch.tensor(drawn).std())
