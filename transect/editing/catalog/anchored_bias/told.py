"""The published remedies against an anchored letter, which are told every item's right answer: an upper bound, no cure.

Source: Li and Gao, 2025, arXiv:2405.03205, and its notebook. For one value vector, v_i <- v_i - a W_U[letter] +
b W_U[right letter] with a = 1 and b = 8, W_U centred over the vocabulary, with the final norm's gain folded in. And for
some heads, in the last token's row of the attention pattern, the weights on the letter and on the right letter
exchanged. Both are made anew for every item and taken back, so what they gain is knowledge of the answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ....data import Specimen
from ....forward import watch
from ....forward.lens import Lens
from .anchors import head_outputs, leaning_heads, read_direction
from .letters import Items, alike, letter_logits, swapped_letter_logits

CANDIDATES = 10  # neurons of a layer that are looked at
TOWARDS = 8.0  # b


class Told(NamedTuple):
    """A neuron, and the sign of its mean activation at the last token of the items that are answered wrongly.

    Where it is negative (the tail of GELU), the edit has to be turned round to have its effect.
    """

    layer: int
    neuron: int
    sign: float


@torch.no_grad()
def told_neuron(specimen: Specimen, items: Items, plain: Tensor, letter: int, threshold: float) -> Told | None:
    """Which neuron the edit changes, or None; chosen on the items that are wrongly answered with the letter.

    D is a logit of the letter less that of the right one, of a part of the stream put through the final norm alone. In
    every MLP of mean D above the threshold, the `CANDIDATES` neurons of largest mean |k_i| ‖v_i‖ are looked at; the one
    whose own k_i v_i has the largest mean D is chosen, over all layers, if that is above the threshold. The output
    bias, which the authors add to each neuron, is left out. plain (n x c): the letters that are answered.
    """
    lens, blocks = specimen.lens, specimen.anatomy.blocks
    cases = list(_wrong_cases(specimen, items, plain, letter))
    count = sum(len(right) for _, right in cases)
    leans: dict[int, float] = {}
    sizes: dict[int, Tensor] = {}
    means: dict[int, Tensor] = {}
    for ids, right in cases:
        with watch(specimen.anatomy, ["mlp", "neurons"]) as seen:
            specimen.model.base_model(input_ids=ids, use_cache=False)
        for layer, active in seen.neurons.items():
            k = active[:, -1].double()
            d = against(lens, seen.mlp[layer][:, -1], items.tokens, letter, right)
            leans[layer] = leans.get(layer, 0.0) + float(d.sum()) / count
            sizes[layer] = sizes.get(layer, 0) + k.abs().sum(0) / count
            means[layer] = means.get(layer, 0) + k.sum(0) / count
    candidates: dict[int, Tensor] = {}
    for layer in (layer for layer, lean in leans.items() if lean > threshold):
        lengths = blocks[layer].matrix("down").weight.double().norm(dim=0)
        candidates[layer] = (sizes[layer] * lengths).topk(min(CANDIDATES, len(lengths))).indices
    gains: dict[int, Tensor] = {}
    for ids, right in cases:
        with watch(specimen.anatomy, ["neurons"], list(candidates)) as seen:
            specimen.model.base_model(input_ids=ids, use_cache=False)
        for layer, neurons in candidates.items():
            each = seen.neurons[layer][:, -1, neurons, None] * blocks[layer].matrix("down").weight[:, neurons].T
            d = against(lens, each, items.tokens, letter, right)  # B x candidates
            gains[layer] = gains.get(layer, 0) + d.sum(0) / count
    best = max(((float(gain.max()), layer, int(gain.argmax())) for layer, gain in gains.items()), default=None)
    if best is None or best[0] <= threshold:
        return None
    neuron = int(candidates[best[1]][best[2]])
    return Told(best[1], neuron, float(means[best[1]][neuron].sign()))


def told_answers(specimen: Specimen, items: Items, plain: Tensor, letter: int, told: Told, away: float) -> Tensor:
    """Letters answered (n x c), every wrong answer with the letter replaced by that of the model edited for its item.

    plain (n x c): the letters that are answered. away: a, how much of the letter is taken away. The matrix is bit for
    bit as before afterwards, also after an error.
    """
    down = specimen.anatomy.blocks[told.layer].matrix("down")
    before = down.weight.clone()
    given = plain.clone()
    try:
        for right in range(len(items.letters)):
            cases = (plain == letter) & (items.answers == right)
            if right == letter or not cases.any():
                continue
            weight = before.to(torch.float64, copy=True)
            weight[:, told.neuron] += told.sign * told_change(specimen.lens, items.tokens, letter, right, away)
            down.write(weight)
            given[cases] = letter_logits(specimen, items, cases)[cases].argmax(-1)
    finally:
        down.write(before)
    return given


@torch.no_grad()
def told_heads(
    specimen: Specimen, items: Items, plain: Tensor, letter: int, threshold: float
) -> list[tuple[int, int, float]]:  # fmt: skip
    """(layer, head, D) of the heads whose attention is swapped; chosen as `told_neuron` is, on the same cases.

    Those whose own output has the largest mean D at the last token, above the threshold. How many heads the paper takes
    is not published: at most `anchors.HEADS` here (ours). plain (n x c): the letters that are answered.
    """
    blocks = specimen.anatomy.blocks
    most = max((block.attention.heads for block in blocks if block.attention is not None), default=0)
    leans, count = torch.zeros(specimen.layers, most, dtype=torch.float64), 0
    for ids, right in _wrong_cases(specimen, items, plain, letter):
        with watch(specimen.anatomy, ["heads"]) as seen:
            specimen.model.base_model(input_ids=ids, use_cache=False)
        count += len(right)
        for layer, heads in seen.heads.items():
            outputs = head_outputs(blocks[layer], heads[:, -1])
            d = against(specimen.lens, outputs, items.tokens, letter, right)  # B x heads
            leans[layer, : d.shape[1]] += d.sum(0).cpu()
    return leaning_heads(leans / max(count, 1), threshold)


def told_swap(
    specimen: Specimen, items: Items, plain: Tensor, letter: int, heads: Mapping[int, Sequence[int]]
) -> Tensor:  # fmt: skip
    """Letters answered (n x c), every wrong answer with the letter replaced by that under swapped attention.

    plain (n x c): the letters that are answered. heads: whose attention is swapped, by layer.
    """
    cases = (plain == letter) & (items.answers != letter)
    return torch.where(cases, swapped_letter_logits(specimen, items, heads, letter, cases).argmax(-1), plain)


def told_change(lens: Lens, tokens: Tensor, letter: int, right: int, away: float) -> Tensor:
    """-a W_U[letter] + b W_U[right] (d), float64, of the centred W_U with the final norm's gain folded in."""
    rows = lens.weight[tokens.to(lens.weight.device)].double() - lens.weight.double().mean(0)
    return read_direction(lens, TOWARDS * rows[right] - away * rows[letter])


def against(lens: Lens, states: Tensor, tokens: Tensor, letter: int, right: Tensor) -> Tensor:
    """D of states (B x ... x d): the letter's logit less the right one's (right: B), float64."""
    normed = (states if lens.norm is None else lens.norm(states)).double()
    rows = lens.weight[tokens.to(lens.weight.device)].double()
    difference = rows[letter] - rows[right.to(rows.device)]  # B x d
    return (normed * difference.view(len(right), *[1] * (states.dim() - 2), -1)).sum(-1)


def _wrong_cases(specimen: Specimen, items: Items, plain: Tensor, letter: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Prompts (B x T) that are answered with the letter although another is right, and the right ones (B)."""
    for where, ids, _ in alike(items, (plain == letter) & (items.answers != letter)):
        yield ids.to(specimen.model.device), items.answers[where]
