"""Claims of the anchored-letter edit (Li and Gao, 2025, arXiv:2405.03205)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...anatomy import Matrix
from ...data import Specimen
from ...editing import Journal, edit
from ...editing.catalog.anchored_bias.anchored_bias import (
    answers,
    favoured,
    share_of_lead,
    split,
    turn,
    turned,
)
from ...editing.catalog.anchored_bias.anchors import Leaning, by_layer, leaning, leaning_heads, letter_direction
from ...editing.catalog.anchored_bias.letters import Answers, averaged_letter_logits, items_of, letter_logits
from ...editing.catalog.anchored_bias.told import told_answers, told_heads, told_neuron, told_swap
from ...evaluation import evaluate_loss
from ..context import Context
from ..registry import NotApplicable, Result, Verdict, claim

PAPER = edit("anchored-bias").paper
DRAWS = 5  # of as many random neurons
CLEAR = 2  # standard errors
LITTLE, DEARER = 0.05, 0.01  # of accuracy, and of perplexity
TOLD_EDIT, TOLD_SWAP = "told the answers, edited (upper bound)", "told the answers, swapped (upper bound)"
RANDOM_SWAP = "told the answers, random heads swapped"


@dataclass
class Study:
    """What every claim reads: the favoured letter, and each variant's answers and loss on items that chose nothing.

    favoured_on: items that the letter and the neurons were chosen with. rows: numbers, a row a variant.
    """

    letters: tuple[str, ...]
    letter: int
    favoured_on: int
    given: dict[str, Answers]
    losses: dict[str, float]
    rows: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.letters[self.letter]

    def bias(self, variant: str) -> float:
        """How often the letter is answered where another is right."""
        return self.given[variant].bias_rate(self.letter)

    def where(self, variant: str, right: bool) -> float:
        """Accuracy where the letter is right, or where another one is."""
        places = self.given[variant].by_place
        others = [number for number in range(len(places)) if number != self.letter]
        return float(places[self.letter] if right else places[others].mean())

    def told(self) -> str:
        """How it was measured, for the sentences."""
        count, turns = len(self.given["unedited"].right), len(self.letters)
        return (
            f"Letter {self.name}, favoured on {self.favoured_on} items; {count} other items, each in all {turns} "
            "rotations"
        )


@lru_cache(maxsize=1)
def study_of(context: Context) -> Study:
    """Every variant, once for all claims. With the default settings; random neurons and what else could be done beside.

    Raises NotApplicable where nothing adds to the letter.
    """
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
    study = Study(judging.letters, letter, len(choosing), {}, {}, [])

    def note(name: str, given: Answers) -> None:
        """Keep one measured variant."""
        study.given[name] = given
        study.losses[name] = evaluate_loss(specimen.model, context.evaluation).loss
        study.rows.append(
            {
                "model": name, "accuracy": given.accuracy, "spread": given.spread,
                "where_right": study.where(name, True), "where_wrong": study.where(name, False),
                "bias_rate": study.bias(name), "consistent": given.consistency, "loss": study.losses[name],
            }
        )  # fmt: skip

    def with_weights(name: str, write: Callable[[Journal], Any]) -> None:
        journal = Journal(specimen.model)
        try:
            write(journal)
            note(name, answers(letter_logits(specimen, judging), judging))
        finally:
            journal.undo()

    note("unedited", answers(plain, judging))
    towards = letter_direction(specimen.lens, choosing.tokens, letter)
    part = settings["beta"] * share_of_lead(found, chosen, before, letter)
    with_weights("edited", lambda journal: turn(specimen, journal, chosen, towards, part))
    with_weights("edited, cancel all", lambda journal: turn(specimen, journal, chosen, towards, settings["beta"]))
    with_weights("neurons silenced", lambda journal: silence(specimen, journal, chosen))
    generator = torch.Generator().manual_seed(specimen.seed)
    for draw in range(DRAWS):
        others = random_neurons(found, chosen, generator)
        with_weights(f"random silenced {draw}", lambda journal, others=others: silence(specimen, journal, others))
    heads = by_layer(leaning_heads(found.heads, settings["threshold"]))
    note("attention averaged", answers(averaged_letter_logits(specimen, judging, heads), judging))
    note("letters calibrated", answers(plain - before.mean((0, 1)), judging))
    judged = plain.argmax(-1)
    neuron = told_neuron(specimen, choosing, before.argmax(-1), letter, settings["threshold"])
    if neuron is not None:
        note(TOLD_EDIT, Answers(told_answers(specimen, judging, judged, letter, neuron, 1.0), judging.answers))
    swapping = told_heads(specimen, choosing, before.argmax(-1), letter, settings["threshold"])
    if swapping:
        note(TOLD_SWAP, Answers(told_swap(specimen, judging, judged, letter, by_layer(swapping)), judging.answers))
        for draw in range(DRAWS):
            others = random_heads(specimen, len(swapping), generator)
            note(
                f"{RANDOM_SWAP} {draw}", Answers(told_swap(specimen, judging, judged, letter, others), judging.answers)
            )
    return study


@claim(
    "anchored-bias/spread",
    method="anchored-bias",
    paper=PAPER,
    statement="Turning the neurons that write a favoured letter reduces the spread of accuracy over the places of the "
    "answer, on items that took no part in the choice.",
)
def spread(context: Context) -> Result:
    """With the default settings; beside it what else could be done, the same neurons silenced, and random ones."""
    study = study_of(context)
    unedited, edited = study.given["unedited"], study.given["edited"]
    change, error = spread_change(unedited, edited)
    told = (
        f"{study.told()}. Spread {unedited.spread:.1%} before and {edited.spread:.1%} after "
        f"({change:+.1%}, bootstrap standard error {error:.1%}), accuracy {unedited.accuracy:.1%} and "
        f"{edited.accuracy:.1%} with {1 / len(study.letters):.0%} by chance, answered {study.name} "
        f"where it is wrong {study.bias('unedited'):.1%} and {study.bias('edited'):.1%}"
    )
    holds = change < 0
    if holds and abs(change) < CLEAR * error:
        told += f". The fall is within {CLEAR} standard errors of 0"
    return Result(Verdict.of(holds), told, study.rows)


@claim(
    "anchored-bias/bias-rate",
    method="anchored-bias",
    paper=PAPER,
    statement="Turning the neurons that write a favoured letter makes it rarer where it is wrong, raises accuracy "
    "there, and changes accuracy where it is right and the perplexity of plain text little.",
)
def bias_rate(context: Context) -> Result:
    """Little is less than five points of accuracy, and less than a hundredth of the perplexity (ours)."""
    study = study_of(context)
    (bias, wrong, right, loss), (new_bias, new_wrong, new_right, new_loss) = (
        (study.bias(name), study.where(name, False), study.where(name, True), study.losses[name])
        for name in ("unedited", "edited")
    )
    dearer = math.exp(new_loss - loss) - 1
    holds = new_bias < bias and new_wrong > wrong and abs(new_right - right) < LITTLE and abs(dearer) < DEARER
    told = (
        f"{study.told()}. Answered {study.name} where it is wrong {bias:.1%} before and {new_bias:.1%} after, accuracy "
        f"there {wrong:.1%} and {new_wrong:.1%}, accuracy where it is right {right:.1%} and {new_right:.1%}, "
        f"perplexity {math.exp(loss):.4f} and {math.exp(new_loss):.4f} ({dearer:+.2%})"
    )
    return Result(Verdict.of(holds), told, study.rows)


@claim(
    "anchored-bias/consistency",
    method="anchored-bias",
    paper=PAPER,
    statement="Turning the neurons that write a favoured letter lets the model choose the same option in every order "
    "of the options more often.",
)
def consistency(context: Context) -> Result:
    """In all rotations of the options; with c letters, 1/c^(c-1) of the items by chance."""
    study = study_of(context)
    before, after = (study.given[name].consistency for name in ("unedited", "edited"))
    count, letters = len(study.given["unedited"].right), len(study.letters)
    told = (
        f"{study.told()}. The same option in every rotation for {before:.1%} of the items before and {after:.1%} "
        f"after, {1 / letters ** (letters - 1):.1%} by chance"
    )
    error = ((before * (1 - before) + after * (1 - after)) / count) ** 0.5
    if abs(after - before) < CLEAR * error:
        told += f". The difference is within {CLEAR} standard errors ({error:.1%}) of 0"
    return Result(Verdict.of(after > before), told, study.rows)


@claim(
    "anchored-bias/attention-swap",
    method="anchored-bias",
    paper=PAPER,
    statement="Where a favoured letter is answered wrongly, exchanging the last token's attention to it and to the "
    "right letter in the heads that lean to it mends more answers than in as many random heads. It is told the right "
    "letters, and so an upper bound.",
)
def attention_swap(context: Context) -> Result:
    """In at most five heads that lean to the letter against the right one, chosen on other items."""
    study = study_of(context)
    if TOLD_SWAP not in study.given:
        raise NotApplicable(f"no head leans to {study.name} against the right letter")
    before, after = study.given["unedited"].accuracy, study.given[TOLD_SWAP].accuracy
    random = [given.accuracy for name, given in study.given.items() if name.startswith(RANDOM_SWAP)]
    control = sum(random) / len(random)
    told = (
        f"{study.told()}. Answered {study.name} where it is wrong {study.bias('unedited'):.1%} before and "
        f"{study.bias(TOLD_SWAP):.1%} after the swap, accuracy {before:.1%} and {after:.1%}; random heads {control:.1%}"
    )
    if TOLD_EDIT in study.given:
        told += f"; the published edit of one neuron, told the same, {study.given[TOLD_EDIT].accuracy:.1%}"
    return Result(Verdict.of(after > max(before, control)), told, study.rows)


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


def random_heads(specimen: Specimen, count: int, generator: torch.Generator) -> dict[int, list[int]]:
    """So many of all heads, by layer."""
    heads = [
        (block.index, head)
        for block in specimen.anatomy.blocks
        for head in range(0 if block.attention is None else block.attention.heads)
    ]
    found: dict[int, list[int]] = {}
    for number in torch.randperm(len(heads), generator=generator)[:count].tolist():
        layer, head = heads[number]
        found.setdefault(layer, []).append(head)
    return found


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
