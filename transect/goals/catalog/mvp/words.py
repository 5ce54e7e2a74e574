"""Label words: which tokens in the blank stand for which class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ....errors import BadData, TransectError
from ....parameters import pieces
from .template import Template

Pool = Literal["max", "mean"]
Given = Mapping[Any, Sequence[str]]


def parsed_words(written: str) -> dict[str, list[str]]:
    """`negative: bad, awful; positive: good, great` by class."""
    found: dict[str, list[str]] = {}
    for part in filter(str.strip, written.split(";")):
        name, colon, words = part.partition(":")
        if not colon or name.strip() in found:
            raise TransectError(
                f"label words are written `class: word, word; other class: word`, every class once, not {written!r}"
            )
        found[name.strip()] = pieces(words)
    return found


@dataclass(frozen=True)
class Words:
    """classes: their names (C). ids: the token of every word in every template (T x W). owner: its class (W)."""

    classes: tuple[str, ...]
    ids: Tensor
    owner: Tensor

    @staticmethod
    def of(given: Given, templates: Sequence[Template]) -> Words:
        """TransectError for fewer than two classes, one without words, a word given twice or of more than one token."""
        if len(given) < 2:
            raise TransectError(
                f"label words of two classes or more are needed, got {len(given)}: "
                "such as `negative: bad, awful; positive: good, great`"
            )
        for name, words in given.items():
            if isinstance(words, str) or not list(words):
                raise TransectError(f"the class {str(name)!r} needs a list of label words, got {words!r}")
        listed = [(number, word.strip()) for number, words in enumerate(given.values()) for word in words]
        ids = [[template.word_id(word) for _, word in listed] for template in templates]
        for template, row in zip(templates, ids, strict=True):
            for i, token in enumerate(row):
                if token in row[:i]:
                    raise TransectError(
                        f"the label words {listed[row.index(token)][1]!r} and {listed[i][1]!r} are the same token in "
                        f"{template.written!r}: every word counts once"
                    )
        owner = torch.tensor([number for number, _ in listed])
        return Words(tuple(map(str, given)), torch.tensor(ids), owner)

    def number(self, label: Any) -> int:
        """The class of a label: its name, or its number in the order of the classes."""
        if str(label) in self.classes:
            return self.classes.index(str(label))
        number = label.item() if isinstance(label, Tensor) and label.numel() == 1 else label
        if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(self.classes):
            return number
        raise BadData(f"label {label!r} is none of the classes {', '.join(self.classes)}")

    def pooled(self, scores: Tensor, how: Pool) -> Tensor:
        """Of each class the largest or the mean score of its words: (..., W) to (..., C)."""
        parts = [scores[..., self.owner.to(scores.device) == number] for number in range(len(self.classes))]
        return torch.stack([pooled(part, how, -1) for part in parts], -1)


def pooled(scores: Tensor, how: Pool, dim: int) -> Tensor:
    """The largest, whose gradient goes to one of them, or the mean."""
    return scores.max(dim).values if how == "max" else scores.mean(dim)
