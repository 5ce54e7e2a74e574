"""Which preferences train what: by category and aspect, and in parts that share no prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..data import Preference
from ..errors import BadData
from .settings import Settings

Halves = tuple[list[Preference], list[Preference]]  # to train on, and held out


@dataclass
class Arranged:
    """Of one category. aggregator: None where it has no aspects."""

    base: Halves
    aspects: dict[str, Halves] = field(default_factory=dict)
    aggregator: Halves | None = None


def arranged(
    pairs: Sequence[Preference],
    settings: Settings,
    categories: Sequence[str] | None = None,
    aspects: Sequence[str] | None = None,
) -> dict[str, Arranged]:
    """By category, in the given order, or by name. aspects: what every category has; default: what its data has.

    Raises BadData for a category or aspect without data, and for too few prompts, naming them.
    """
    found: dict[str, Arranged] = {}
    for category in sorted({pair.category for pair in pairs}) if categories is None else categories:
        mine = [pair for pair in pairs if pair.category == category]
        whole = [pair for pair in mine if pair.aspect is None]
        named = sorted({pair.aspect for pair in mine if pair.aspect is not None}) if aspects is None else list(aspects)
        if not whole:
            raise BadData(
                f"the category {category!r} has no pair without an aspect, and such pairs train its backbone"
                if mine
                else f"the category {category!r} has no data"
            )
        first, rest = divided(whole, settings.base_share, settings.seed, category) if named else (whole, [])
        found[category] = Arranged(_halves(first, settings, category))
        if named:
            found[category].aggregator = _halves(rest, settings, category)
        for aspect in named:
            of_aspect = [pair for pair in mine if pair.aspect == aspect]
            if not of_aspect:
                raise BadData(f"the aspect {aspect!r} has no data in the category {category!r}")
            found[category].aspects[aspect] = _halves(of_aspect, settings, f"{category}, {aspect}")
    return found


def divided(pairs: Sequence[Preference], share: float, seed: int, name: str) -> Halves:
    """The pairs of about `share` of the prompts, and those of the others; one prompt each at least.

    A prompt's pairs stay together: on those that were trained on, nothing can be judged. name: for the message of
    BadData, if there is one prompt alone.
    """
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
    if len(prompts) < 2:
        raise BadData(
            f"{name}: {len(prompts)} prompt is left where two are needed, one to train on and one to hold out: give "
            "preferences for more prompts"
        )
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    taken = min(max(1, round(share * len(prompts))), len(prompts) - 1)
    first = {prompts[place] for place in order[:taken]}
    return [pair for pair in pairs if pair.prompt in first], [pair for pair in pairs if pair.prompt not in first]


def prompts_of(found: dict[str, Arranged], settings: Settings) -> tuple[tuple[list[str], list[int]], ...]:
    """(prompts, numbers of their categories) to train a router on, and held-out ones of each category."""
    parts: tuple[tuple[list[str], list[int]], ...] = (([], []), ([], []))
    for number, (category, one) in enumerate(found.items()):
        halves = [one.base, *one.aspects.values(), *([one.aggregator] if one.aggregator else [])]
        pairs = [pair for half in halves for part in half for pair in part]
        divisions = divided(pairs, 1 - settings.held_out, settings.seed, category)
        for (prompts, labels), half in zip(parts, divisions, strict=True):
            new = list(dict.fromkeys(pair.prompt for pair in half))
            prompts += new
            labels += [number] * len(new)
    return parts


def _halves(pairs: Sequence[Preference], settings: Settings, name: str) -> Halves:
    """In a random order of the pairs to train on."""
    training, held_out = divided(pairs, 1 - settings.held_out, settings.seed, name)
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(settings.seed + 1)).tolist()
    return [training[place] for place in order], held_out
