"""A letter that is answered whatever is asked: the MLP neurons that write it are turned away from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from ....data import Choice, Specimen
from ....errors import BadData, NotApplicable, TransectError
from ....parameters import Range
from ...journal import Journal
from ...registry import editing
from .anchors import (
    Leaning,
    by_layer,
    leaning,
    leaning_heads,
    letter_direction,
    project_out,
    written_direction,
)
from .letters import Answers, Items, averaged_letter_logits, items_of, letter_logits, usual
from .told import told_answers, told_heads, told_neuron, told_swap

MOST = "most"
CALIBRATION, JUDGED = 200, 300  # items, at most


def split(specimen: Specimen) -> tuple[list[Choice], list[Choice]]:
    """The items that neurons are selected with, and those that the edit is judged by: the first ones, and the next.

    Raises BadData for fewer than two.
    """
    choices = usual(specimen.choices)
    if len(choices) < 2:
        raise BadData("anchored-bias needs at least two items with the same letters: to select by, and to judge by")
    count = min(CALIBRATION, len(choices) // 2)
    return choices[:count], choices[count : count + JUDGED]


def answers(logits: Tensor, items: Items) -> Answers:
    return Answers(logits.argmax(-1), items.answers)


def measure(specimen: Specimen) -> dict[str, float]:
    """How the items that select nothing are answered, each in all rotations of its options; the frame adds the loss."""
    items = items_of(specimen, split(specimen)[1])
    given = answers(letter_logits(specimen, items), items)
    first = items.letters[0]
    return {
        f"accuracy, {len(items)} items": given.accuracy,
        "spread of accuracy over the places of the answer": given.spread,
        f"accuracy where {first} is right": float(given.by_place[0]),
        f"accuracy where {first} is wrong": float(given.by_place[1:].mean()),
        f"answered {first} where it is wrong": given.bias_rate(0),
        "same option chosen in every rotation": given.consistency,
        **{f"answered {letter}": float(share) for letter, share in zip(items.letters, given.answered, strict=True)},
    }


def check(specimen: Specimen, *, anchor: str, **rest: Any) -> None:
    """Items, letters and the model, before any work."""
    specimen.require_causal()
    specimen.require_contributions()
    _ = specimen.lens
    choices, _ = split(specimen)
    if anchor not in (MOST, *choices[0].letters):
        raise TransectError(
            f"anchored-bias: anchor={anchor!r} should be {MOST} or one of {', '.join(choices[0].letters)}"
        )
    items_of(specimen, choices[:1])


@editing("anchored-bias", paper="arXiv:2405.03205", measure=measure, check=check)
def anchored_bias(
    specimen: Specimen,
    journal: Journal,
    *,
    anchor: str = MOST,
    neurons: Annotated[int, Range(1, 10000)] = 10,
    beta: Annotated[float, Range(0, 1)] = 1.0,
    cancel: Literal["lead", "all"] = "lead",
    threshold: float = 0.0,
    oracle_upper_bound: bool = False,
) -> Mapping[str, Any]:
    """Take a favoured letter of multiple-choice answers out of the MLP neurons that write it; no right answer is read.

    Neuron i of an MLP adds k_i v_i to the residual stream. The neurons that on average over the first items, each asked
    in every rotation of its options, add most to the letter's logit against the other letters' are turned:
    v_i <- v_i - beta P v_i, with P the projector on ŵ = W_U[letter] - mean of the other letters' W_U, the final norm's
    gain folded in. The paper's own edit needs every item's right answer; this label-free one is our design. The card is
    about items that took no part in the choice. Answers are the likeliest of the letters.

    The notes say which MLPs and heads lean to the letter (on their own under the final norm, means in logits), and what
    two remedies would do that no plain checkpoint can hold: averaging the attention of the leaning heads over the
    letters, and subtracting each letter's mean logit, measured on the first items.

    Every default here but the paper's own remedies is ours.

    anchor: the letter, or most for the one that is answered most often. The paper takes A.
    neurons: how many are turned, over all layers, at most. The paper changes one of a layer.
    beta: how much of what cancel names goes; 0 changes nothing, 1 all of it.
    cancel: lead takes out of these neurons, in equal shares, only by how much the letter's mean logit exceeds the mean
        of the others on the first items, as far as it reaches the logits directly; all takes out everything that they
        have of ŵ, which can turn a letter that is favoured a little into one that is never answered.
    threshold: an MLP or head counts if it leans to the letter by more, in logits. The paper takes 4 for GPT-2, against
        the right letter; the scale depends on the model.
    oracle_upper_bound: also measure the two published remedies, which are told each item's right letter: the edit of
        one neuron, v - W_U[letter] + 8 W_U[right letter], and the swap of attention, where the last token looks at
        the right letter as it did at the letter, and the other way round, in at most five heads that lean to the letter
        against the right one. They are upper bounds and no remedies, for they are another change for every item:
        nothing of them stays in the model, and no checkpoint could hold them.
    """
    choosing, judging = (items_of(specimen, part) for part in split(specimen))
    before = letter_logits(specimen, choosing)
    letter = favoured(before) if anchor == MOST else choosing.letters.index(anchor)
    found = leaning(specimen, choosing, letter)
    chosen = turned(found, neurons, threshold)
    if not chosen:
        raise NotApplicable(
            f"no neuron of an MLP that leans to {choosing.letters[letter]} by more than {threshold:g} adds to it: "
            "lower the threshold, or there is nothing to take out"
        )
    notes: dict[str, Any] = {
        "letter": choosing.letters[letter],
        "items left out, with other letters": len(specimen.choices) - len(usual(specimen.choices)),
        "MLPs lean by": ", ".join(f"{layer}: {float(value):+.2f}" for layer, value in enumerate(found.mlps)),
    }
    heads = leaning_heads(found.heads, threshold)
    notes["heads that lean most"] = ", ".join(f"{layer}.{head}: {by:+.2f}" for layer, head, by in heads) or "none"
    plain = letter_logits(specimen, judging)
    notes |= _other_remedies(specimen, judging, plain, before, heads)
    if oracle_upper_bound:
        notes |= _upper_bound(specimen, choosing, judging, before.argmax(-1), plain.argmax(-1), letter, threshold)
    part = beta * (share_of_lead(found, chosen, before, letter) if cancel == "lead" else 1.0)
    turn(specimen, journal, chosen, letter_direction(specimen.lens, choosing.tokens, letter), part)
    return notes | {
        "neurons turned": ", ".join(f"{layer}:{neuron}" for layer, neuron in chosen),
        "what they add to the letter, logits": added(found, chosen),
        "lead of the letter, logits": mean_lead(before, letter),
        "share of their letter direction taken out": part,
    }


def turn(
    specimen: Specimen, journal: Journal, neurons: Sequence[tuple[int, int]], towards: Tensor, part: float
) -> None:
    """Project a part of a direction of the stream (d) out of the value vectors of neurons (layer, neuron)."""
    for layer in dict.fromkeys(layer for layer, _ in neurons):
        block = specimen.anatomy.blocks[layer]
        down = block.matrix("down")
        columns = [neuron for one, neuron in neurons if one == layer]
        weight = down.weight.to(torch.float64, copy=True)
        weight[:, columns] = project_out(weight[:, columns], written_direction(block, towards), part)
        journal.write(down, weight)


def added(found: Leaning, neurons: Sequence[tuple[int, int]]) -> float:
    """What neurons add to the letter's logit against the others', on average over the prompts."""
    return sum(float(found.neurons[layer][neuron]) for layer, neuron in neurons)


def share_of_lead(found: Leaning, neurons: Sequence[tuple[int, int]], logits: Tensor, letter: int) -> float:
    """How large a share of what the neurons add is the letter's lead; at most 1, and 0 where it does not lead."""
    return min(max(mean_lead(logits, letter) / added(found, neurons), 0.0), 1.0)


def favoured(logits: Tensor) -> int:
    """The letter that is answered most often."""
    return int(torch.bincount(logits.argmax(-1).flatten(), minlength=logits.shape[-1]).argmax())


def mean_lead(logits: Tensor, letter: int) -> float:
    """The letter's mean logit less the mean of the others' (logits: n x c x c)."""
    means = logits.mean((0, 1))
    return float(means[letter] - (means.sum() - means[letter]) / (len(means) - 1))


def turned(found: Leaning, count: int, threshold: float) -> list[tuple[int, int]]:
    """(layer, neuron) of what adds most to the letter, in MLPs that lean to it by more than the threshold."""
    scores = [
        (float(score), layer, int(neuron))
        for layer, all_scores in found.neurons.items()
        if found.mlps[layer] > threshold
        for score, neuron in zip(*all_scores.topk(min(count, len(all_scores))), strict=True)
        if score > 0
    ]
    return [(layer, neuron) for _, layer, neuron in sorted(scores, key=lambda one: -one[0])[:count]]


def _other_remedies(
    specimen: Specimen, judging: Items, plain: Tensor, calibration: Tensor, heads: Sequence[tuple[int, int, float]]
) -> dict[str, str]:
    """Attention averaging and letter calibration on the unedited model, whose logits are `plain`, in words."""
    told = {"unedited": described(answers(plain, judging))}
    if heads:
        averaged = averaged_letter_logits(specimen, judging, by_layer(heads))
        told["attention of these heads averaged over the letters"] = described(answers(averaged, judging))
    told["mean logit of each letter subtracted"] = described(answers(plain - calibration.mean((0, 1)), judging))
    return told


def described(given: Answers) -> str:
    return f"accuracy {given.accuracy:.1%}, spread {given.spread:.1%}, consistency {given.consistency:.1%}"


def _upper_bound(
    specimen: Specimen, choosing: Items, judging: Items, chosen: Tensor, judged: Tensor, letter: int, threshold: float
) -> dict[str, str]:
    """What the published remedies do, in words. chosen, judged: what is answered to both kinds of items (n x c)."""
    told = {}
    neuron = told_neuron(specimen, choosing, chosen, letter, threshold)
    if neuron is None:
        told["upper bound, published edit"] = "no neuron leans to the letter by more than the threshold"
    else:
        name = f"upper bound: published edit of neuron {neuron.layer}:{neuron.neuron}, told every right letter"
        told[name], told[f"{name}, but nothing taken away"] = (
            described(Answers(told_answers(specimen, judging, judged, letter, neuron, away), judging.answers))
            for away in (1.0, 0.0)
        )
    heads = told_heads(specimen, choosing, chosen, letter, threshold)
    if not heads:
        told["upper bound, published swap"] = "no head leans to the letter by more than the threshold"
    else:
        names = ", ".join(f"{layer}.{head}" for layer, head, _ in heads)
        swapped = told_swap(specimen, judging, judged, letter, by_layer(heads))
        told[f"upper bound: published swap of attention in heads {names}, told every right letter"] = described(
            Answers(swapped, judging.answers)
        )
    return told
