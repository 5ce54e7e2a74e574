"""What is asked along every path, and what counts as the right answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ....data import Choice, Fact, Specimen
from .executor import Executor
from .paths import Path

Kind = Literal["any", "facts", "choices"]


@dataclass(frozen=True)
class Question:
    """text: of the prompt. ids: its tokens, and those of the answer but for the last one (T). answer: tokens (n).

    among: the tokens of a choice's letters, one of which is taken; None where it may be any token. options: how many
    answers there are, for the chance of hitting the right one: letters, or different answers of the facts asked.
    """

    text: str
    ids: Tensor
    answer: tuple[int, ...]
    among: tuple[int, ...] | None
    options: int

    def chance(self, tried: int) -> float:
        """Of hitting the answer with so many different guesses, none of which comes twice; NaN for a single option."""
        return min(1.0, tried / self.options) if self.options > 1 else math.nan


class Answers:
    """What a model answers along each path, remembered by path."""

    def __init__(self, specimen: Specimen, question: Question) -> None:
        self.question, self.executor = question, Executor(specimen.anatomy, question.ids)
        self.given: dict[Path, tuple[int, ...]] = {}

    def __call__(self, path: Path) -> float:
        """1 if the path answers rightly, 0 if not: every token of the answer greedily, or the best of the letters."""
        if path not in self.given:
            at = self.executor.logits(path)[-len(self.question.answer) :]
            among = self.question.among
            best = at.argmax(-1) if among is None else torch.tensor(among)[at[:, list(among)].argmax(-1).cpu()]
            self.given[path] = tuple(best.tolist())
        return float(self.given[path] == self.question.answer)

    def different(self, paths: Sequence[Path]) -> int:
        """How many different answers these paths give."""
        return len({self.given[path] for path in paths})


def questions_of(specimen: Specimen, kind: Kind, count: int, tokens: int) -> list[Question]:
    """Questions of the specimen, of more than `count` a choice at random.

    tokens: of a fact's answer that are asked for. kind: "any" takes facts where there are any, and choices otherwise.
    Raises NotApplicable where there are none, or a letter is no single token; BadData where an answer has no tokens.
    """
    if kind == "choices" or (kind == "any" and not specimen.known_facts and specimen.known_choices):
        return [_of_choice(specimen, one) for one in _drawn(specimen.choices, count, specimen.seed)]
    answers = {tuple(specimen.continuation(one.text, one.answer)[:tokens].tolist()) for one in specimen.facts}
    return [_of_fact(specimen, one, tokens, len(answers)) for one in _drawn(specimen.facts, count, specimen.seed)]


def _of_fact(specimen: Specimen, fact: Fact, tokens: int, options: int) -> Question:
    answer = specimen.continuation(fact.text, fact.answer)[:tokens]
    ids = torch.cat([specimen.encode(fact.text), answer[:-1]])
    return Question(f"{fact.text} {fact.answer}", ids, tuple(answer.tolist()), None, options)


def _of_choice(specimen: Specimen, choice: Choice) -> Question:
    letters = tuple(specimen.single_token(choice.prompt, letter) for letter in choice.letters)
    right = (letters[choice.answer],)
    text = f"{choice.prompt} {choice.letters[choice.answer]}"
    return Question(text, specimen.encode(choice.prompt), right, letters, len(letters))


def _drawn(items: Sequence, count: int, seed: int) -> list:
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    return [items[number] for number in sorted(order[:count])]
