"""Questions about what a model knows: facts with a subject, multiple-choice items, passages with their endings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from .sources import written


@dataclass(frozen=True)
class Passage:
    """A prompt and what follows it after one space."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Fact:
    """A statement about a subject.

    prompt: with `{}` where the subject stands, such as "{} lives in". answer: what follows after one space.
    new_answer: what an edit is to put in its place. paraphrases: whole prompts with the same answer.
    neighbours: prompts of other facts with their answers, which an edit should leave alone.
    """

    prompt: str
    subject: str
    answer: str
    new_answer: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[Passage, ...] = ()

    @property
    def text(self) -> str:
        """The prompt with the subject in it."""
        return self.prompt.replace("{}", self.subject)


@dataclass(frozen=True)
class Choice:
    """A multiple-choice item.

    prompt: with the options in it, ending where the letter of the answer follows after one space.
    letters: what may be answered, such as A to D. answer: index of the right one.
    positions: where each letter of the list of options starts in the prompt, in characters. end: where the list ends.
    """

    prompt: str
    letters: tuple[str, ...]
    answer: int
    positions: tuple[int, ...]
    end: int | None = None


def make_choice(template: str, question: str, options: Sequence[str], answer: int) -> Choice:
    """An item with its options written "A first, B second" where the template says {options}."""
    letters = tuple(chr(ord("A") + number) for number in range(len(options)))
    head, found, tail = template.partition("{options}")
    if not found:
        raise ValueError("its template has no {options}")
    head = head.replace("{question}", question)
    positions, shown = [], ""
    for letter, option in zip(letters, options, strict=True):
        shown += ", " if shown else ""
        positions.append(len(head) + len(shown))
        shown += f"{letter} {option}"
    prompt = head + shown + tail.replace("{question}", question)
    return Choice(prompt, letters, answer, tuple(positions), end=len(head + shown))


def text_in(entry: Mapping[str, Any], name: str) -> str:
    """An entry's text of that name; KeyError if there is none, TypeError as for `text_of`."""
    if not isinstance(entry, Mapping):
        raise TypeError(f"a dict with {name!r} is expected, not a {type(entry).__name__}")
    return text_of(entry[name], name)


def text_of(value: Any, name: str) -> str:
    """A text, or a number as one; TypeError for what is neither."""
    if not isinstance(value, (str, Real)) or isinstance(value, bool):
        raise TypeError(f"{name!r} should be a text, not a {type(value).__name__}")
    return written(str(value), f"{name!r}")
