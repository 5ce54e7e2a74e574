"""Preferences: of two answers to a prompt the one that is better, and batches of such pairs.

A higher score is a better answer, everywhere: there are no ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from ..errors import BadData
from .containers import items_of
from .questions import text_in, text_of
from .sources import json_entries

ALL = "all"  # the category where the data names none
_WAYS = (("better", "worse"), ("chosen", "rejected"))


@dataclass(frozen=True)
class Preference:
    """An answer that is better than another one to the same prompt. Prompt and answer are joined as they stand.

    category: of the prompt. aspect: in what it is better; None for better as a whole.
    weight: of the pair in a mean; the pairs of one list of answers have weight 1 together.
    """

    prompt: str
    better: str
    worse: str
    category: str = ALL
    aspect: str | None = None
    weight: float = 1.0


def load_preferences(
    data: Any, *, categories: Sequence[str] | None = None, aspects: Sequence[str] | None = None
) -> list[Preference]:
    """Preferences from a .json or .jsonl file, or a list of `Preference`s or dicts; a data set is read as such a list.

    A dict has `prompt` and `better` and `worse` (or `chosen` and `rejected`), or `prompt`, `answers` and `scores`, of
    which every two answers with different scores are a pair; and perhaps `category` and `aspect`.
    categories, aspects: those that there may be; by default whatever is there.
    Raises BadData, naming the entry: for one without a winner, without answers, or of an unknown category or aspect;
    and where some have a category and others none.
    """
    if isinstance(data, (str, Path)):
        entries: Any = json_entries(Path(data), "the preferences")
    else:
        entries = items_of(data, "the preferences")
    made: list[Preference] = []
    named: list[bool] = []
    for number, entry in enumerate(entries):
        try:
            found = [entry] if isinstance(entry, Preference) else list(_preferences(entry))
            _check_known(found[0].category, categories, "category")
            if found[0].aspect is not None:
                _check_known(found[0].aspect, aspects, "aspect")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            raise BadData(f"entry {number} of the preferences cannot be used: {reason}") from None
        made += found
        named.append(isinstance(entry, Preference) or entry.get("category") is not None)
    if not made:
        raise BadData("there are no preferences")
    if len(set(named)) > 1:
        raise BadData(
            f"entry {named.index(False)} of the preferences has no `category`, and others have one: name it in all, or "
            "in none"
        )
    return made


def _preferences(entry: Mapping[str, Any]) -> Iterator[Preference]:
    """The pairs of an entry, one at least."""
    prompt = text_in(entry, "prompt")
    category = ALL if entry.get("category") is None else text_in(entry, "category").strip()
    aspect = None if entry.get("aspect") is None else text_in(entry, "aspect").strip()
    if not category or aspect == "":
        raise ValueError(f"its {'aspect' if category else 'category'} is empty")
    if "answers" in entry:
        pairs = list(_ranked(entry))
    else:
        names = next((way for way in _WAYS if way[0] in entry or way[1] in entry), _WAYS[0])
        if missing := [name for name in names if entry.get(name) is None]:
            raise ValueError(f"it has no {' and no '.join(map(repr, missing))}: a pair needs a winner and a loser")
        pairs = [(text_in(entry, names[0]), text_in(entry, names[1]))]
    for better, worse in pairs:
        if not better.strip() or not worse.strip():
            raise ValueError("one of its answers is empty")
        if better == worse:
            raise ValueError(f"it has no winner: both of its answers are {better[:40]!r}")
        yield Preference(prompt, better, worse, category, aspect, 1 / len(pairs))


def _ranked(entry: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(better, worse) of every two answers that have different scores."""
    answers, scores = ([*items_of(entry[name], f"`{name}`")] for name in ("answers", "scores"))
    if len(answers) != len(scores):
        raise ValueError(f"it has {len(answers)} answers and {len(scores)} scores")
    if len(answers) < 2:
        raise ValueError(f"it has {len(answers)} answers, and a preference needs two")
    if not all(isinstance(score, Real) and score == score for score in scores):
        raise ValueError(f"its scores should be numbers, got {scores}")
    if len(set(scores)) == 1:
        raise ValueError(f"it has no winner: all of its answers have the score {scores[0]}")
    texts = [text_of(answer, "answers") for answer in answers]
    for one, above in zip(texts, scores, strict=True):
        for other, below in zip(texts, scores, strict=True):
            if above > below:
                yield one, other


def _check_known(name: str, known: Sequence[str] | None, what: str) -> None:
    if known is not None and name not in known:
        raise ValueError(f"the {what} {name!r} is unknown; expected {', '.join(map(repr, known))}")
