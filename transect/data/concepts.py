"""Concepts with their words in several languages: what the same answer is called after a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from ..errors import BadData
from ..parameters import listed
from .containers import items_of
from .questions import text_in, text_of
from .sources import json_entries

ORGANISM_CONCEPTS = 150  # facts of the bundled model's world, each asked in both languages


@dataclass(frozen=True)
class Concept:
    """A prompt in one language, and the word that answers it in each language.

    target: the language that the prompt asks for. words: language -> the word's surface forms, one at least.
    """

    prompt: str
    target: str
    words: Mapping[str, tuple[str, ...]]


def load_concepts(data: str | Path | Sequence[Any]) -> list[Concept]:
    """Concepts from a JSON file (a list), `organism`, or a list of `Concept`s or dicts.

    A dict has `prompt`, `target` and `words`: {"english": "dog", "german": ["Hund", "Dogge"]}. The answer follows the
    prompt after one space. `organism`: facts of the bundled model's world, asked in each of its two languages.
    Raises BadData, naming the entry.
    """
    if data == "organism":
        return _of_organism()
    entries = (
        json_entries(Path(data), "the concepts") if isinstance(data, (str, Path)) else items_of(data, "the concepts")
    )
    made = []
    for number, entry in enumerate(entries):
        try:
            made.append(entry if isinstance(entry, Concept) else _concept(entry))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            raise BadData(f"entry {number} of the concepts cannot be used: {reason}") from None
    if not made:
        raise BadData("there are no concepts")
    return made


def _concept(entry: Mapping[str, Any]) -> Concept:
    if not isinstance(entry, Mapping):
        raise TypeError(f"a dict is expected, not a {type(entry).__name__}")
    words = {}
    for language, forms in entry["words"].items():
        if forms is None:  # as data sets write that a language is missing
            continue
        forms = tuple(text_of(form, language) for form in listed(forms))
        if not forms or not all(form.strip() for form in forms):
            raise ValueError(f"it has no word in {language!r}")
        words[str(language)] = tuple(dict.fromkeys(form.strip() for form in forms))
    prompt, target = text_in(entry, "prompt"), text_in(entry, "target")
    if len(words) < 2:
        raise ValueError(f"it should have words in two languages at least, got {list(words)}")
    if target not in words:
        raise ValueError(f"its target language {target!r} is none of {list(words)}")
    if not prompt.strip():
        raise ValueError("its prompt is empty")
    return Concept(prompt, target, words)


def _of_organism() -> list[Concept]:
    from ..organism import World

    made = []
    for known in Random("concepts").sample(World().facts, ORGANISM_CONCEPTS):
        words = {"language 1": (known.object,), "language 2": (known.object2,)}
        made += [Concept(known.prompt(0, language), f"language {language}", words) for language in (1, 2)]
    return made
