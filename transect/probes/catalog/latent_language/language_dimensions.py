"""Which dimensions of the residual stream tell languages apart, and what swapping them does to the answer.

The paper (arXiv:2408.10811) says that few dimensions carry the language and many the meaning. How this is measured
here is our design. A set is one concept asked in several languages. Dimensions are ranked on the sets of one half
of the meanings and swapped in sets of the other half, so that no word serves both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ....data import Specimen
from ....forward import Lens, changed, watch
from ...neurons import wide
from .languages import Asked, Lexicon, alike, lens_log_probabilities, said

SWAPS = ("nothing", "top dimensions", "random dimensions", "all dimensions")
WORDS = ("language asked for", "language of the other prompt", "any language")
DRAWS = 3  # of random dimensions
RANKED, SWAPPED = 256, 32  # sets at most, for ranking and for swapping

Set = dict[str, int]  # language asked for -> number of the concept


@dataclass(frozen=True)
class Dimensions:
    """What was found.

    apart: between-language share of each dimension's variance ((L + 1) x d), once each set's mean is taken away.
    held: share of the squared distance between the languages' means that the top dimensions hold (L + 1).
    answers: probability of WORDS after each of SWAPS at each layer (SWAPS x (L + 1) x WORDS). count: number of top
    dimensions. ranked, swapped: numbers of sets.
    """

    apart: Tensor
    held: Tensor
    answers: Tensor
    count: int
    ranked: int
    swapped: int


def dimensions_of(specimen: Specimen, lens: Lens, lexicon: Lexicon, share: float) -> Dimensions | None:
    """Rank and swap dimensions; None where fewer than two sets are left to rank or to swap.

    share: of the d dimensions that are swapped, one at least.
    """
    ranking, testing = halves(lexicon)
    if min(len(ranking), len(testing)) < 2:
        return None
    between, total = variances(answer_states(specimen, lexicon.asked, ranking))
    apart = torch.where(total > 0, between / total.clamp_min(torch.finfo(total.dtype).tiny), 0)
    count = max(1, round(share * apart.shape[1]))
    order = apart.sort(dim=1, descending=True, stable=True).indices
    held = between.gather(1, order[:, :count]).sum(1) / between.sum(1).clamp_min(torch.finfo(total.dtype).tiny)
    answers = swapped_answers(specimen, lens, lexicon, testing, order, count)
    return Dimensions(apart, held, answers, count, len(ranking), len(testing))


def sets_of(asked: Sequence[Asked]) -> list[Set]:
    """Concepts of the same meaning, one in each language that is asked for in any two-language set.

    Where a meaning is asked several times in a language, the first times belong together, then the second ...
    """
    found: dict[tuple[object, int], Set] = {}
    times: Counter[tuple[object, str]] = Counter()
    for number, one in enumerate(asked):
        key = (one.meaning, one.target)
        found.setdefault((one.meaning, times[key]), {})[one.target] = number
        times[key] += 1
    several = [one for one in found.values() if len(one) > 1]
    languages = {language for one in several for language in one}
    return [one for one in several if len(one) == len(languages)]


def halves(lexicon: Lexicon) -> tuple[list[Set], list[Set]]:
    """Sets to rank and sets to swap: every other meaning, in the order in which they come."""
    sets = sets_of(lexicon.asked)
    meanings = [lexicon.asked[next(iter(one.values()))].meaning for one in sets]
    number = {meaning: place for place, meaning in enumerate(dict.fromkeys(meanings))}
    odd = [number[meaning] % 2 for meaning in meanings]
    ranking, testing = ([one for one, side in zip(sets, odd, strict=True) if side == part] for part in (0, 1))
    return ranking[:RANKED], testing[:SWAPPED]


@torch.no_grad()
def answer_states(specimen: Specimen, asked: Sequence[Asked], sets: Sequence[Set]) -> Tensor:
    """States where the answer is predicted (sets x languages x (L + 1) x d), float32 or wider, on the CPU.

    The languages of a set are in the order of its names.
    """
    wanted = [one[language] for one in sets for language in sorted(one)]
    pairs = [(asked[number].prompt, torch.empty(0, dtype=torch.long)) for number in wanted]
    found: list[Tensor] = [torch.empty(0)] * len(wanted)
    for numbers, ids, _ in alike(pairs, 1):
        with watch(specimen.anatomy, ["residual"]) as seen:
            specimen.model.base_model(input_ids=ids.to(specimen.model.device), use_cache=False)
        last = torch.stack([wide(seen.residual[state][:, -1]).cpu() for state in range(specimen.layers + 1)], 1)
        for number, states in zip(numbers, last, strict=True):
            found[number] = states
    return torch.stack(found).unflatten(0, (len(sets), -1))


def variances(states: Tensor) -> tuple[Tensor, Tensor]:
    """Variance between languages, and in all, of each dimension ((L + 1) x d) around the means of the sets."""
    centred = states.double() - states.double().mean(1, keepdim=True)
    return centred.mean(0).square().mean(0), centred.square().mean((0, 1))


@torch.no_grad()
def swapped_answers(
    specimen: Specimen, lens: Lens, lexicon: Lexicon, sets: Sequence[Set], order: Tensor, count: int
) -> Tensor:
    """Mean probability of WORDS after each of SWAPS at each layer (SWAPS x (L + 1) x WORDS).

    Dimensions of the state where the answer is predicted take the values that they have for the same concept in the
    next language. order: dimensions of each layer from the one that tells languages apart best ((L + 1) x d).
    """
    states = answer_states(specimen, lexicon.asked, sets)
    other = states.roll(-1, 1).flatten(0, 1)  # of the same concept in the next language
    prompts = [lexicon.asked[one[name]] for one in sets for name in sorted(one)]
    pairs, rows, roles = spoken(prompts, sorted(sets[0]))
    plain = lens_log_probabilities(specimen, lens, pairs)[:, -1].exp() @ roles
    chosen, last = chosen_dimensions(order, count, specimen.seed), specimen.layers
    out = torch.zeros(len(chosen), last + 1, len(WORDS), dtype=torch.float64)
    for numbers, ids, length in alike(pairs, len(lens.weight)):
        ids = ids.to(specimen.model.device)
        for layer in range(last + 1):
            for mask, sums in zip(chosen[:, layer], out[:, layer], strict=True):
                swap = planted(-length - 1, mask, other[rows[numbers], layer])
                with (
                    changed(specimen.anatomy, {("residual", layer): swap}),
                    watch(specimen.anatomy, ["residual"], [last]) as seen,
                ):
                    specimen.model.base_model(input_ids=ids, use_cache=False)
                sums += said(lens, seen.residual[last], ids, length).exp() @ roles[numbers]
    every = torch.stack([plain.expand(last + 1, -1), out[0], out[2:].mean(0), out[1]])
    return every / len(prompts)


def spoken(prompts: Sequence[Asked], names: Sequence[str]) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    """Every form of every prompt's words: (prompt, form), the prompt's number, and which of WORDS it is (n x
    WORDS).

    names: the languages in their order; the other prompt of a concept is the one in the next language.
    """
    pairs, rows, roles = [], [], []
    for row, one in enumerate(prompts):
        other = names[(names.index(one.target) + 1) % len(names)]
        for name, forms in one.forms.items():
            pairs += [(one.prompt, form) for form in forms]
            rows += [row] * len(forms)
            roles += [[name == one.target, name == other, True]] * len(forms)
    return pairs, torch.tensor(rows), torch.tensor(roles, dtype=torch.float64)


def chosen_dimensions(order: Tensor, count: int, seed: int) -> Tensor:
    """Which dimensions are swapped (choices x (L + 1) x d).

    The top ones, all of them, and DRAWS times as many random others as there are top ones.
    """
    layers, width = order.shape
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(2 + DRAWS, layers, width, dtype=torch.bool)
    chosen[1] = True
    for layer, ranked in enumerate(order):
        chosen[0, layer, ranked[:count]] = True
        for draw in chosen[2:]:
            draw[layer, ranked[count + torch.randperm(width - count, generator=generator)[:count]]] = True
    return chosen


def planted(position: int, mask: Tensor, values: Tensor) -> Callable[[Tensor], Tensor]:
    """A change (see `changed`) that puts values (B x d) at one position into the dimensions of a mask (d)."""

    def plant(activations: Tensor) -> Tensor:
        out = activations.clone()
        state = out[:, position]
        out[:, position] = torch.where(mask.to(out.device), values.to(out), state)
        return out

    return plant
