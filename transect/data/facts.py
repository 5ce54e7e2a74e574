"""What a model knows, as questions about it: facts with a subject, multiple-choice items, passages with their endings.

Each is a file, .json (a list) or .jsonl (one object a line), or `organism:facts`, `organism:choices`,
`organism:passages`: those of the bundled model's world.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import BadData

T = TypeVar("T")


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


def load_facts(data: Any) -> list[Fact]:
    """Facts from a file, a name, or objects.

    data: a path, `organism:facts`, or a list of `Fact`s or dicts. A dict has `prompt`, `subject`, `answer`, and perhaps
    `new_answer`, `paraphrases` (strings) and `neighbours` ({"prompt", "answer"}); or it is an entry of
    CounterFact (`requested_rewrite`, `paraphrase_prompts`, `neighborhood_prompts`).
    Raises BadData, naming the entry.
    """
    return _loaded(data, Fact, _fact, "facts")


def load_choices(data: Any) -> list[Choice]:
    """Multiple-choice items from a file, `organism:choices`, or a list of `Choice`s or dicts.

    A dict has `question`, `options` (strings), `answer` (index or letter), and perhaps `template`: how the prompt is
    written, with `{question}` and `{options}`; the options are written "A first, B second".
    """
    return _loaded(data, Choice, _choice, "choices")


def load_passages(data: Any) -> list[Passage]:
    """Passages from a file, `organism:passages`, or a list of `Passage`s or dicts with `prompt` and `answer`."""
    return _loaded(data, Passage, lambda entry: Passage(str(entry["prompt"]), str(entry["answer"])), "passages")


def _loaded(data: Any, kind: type[T], parse: Any, what: str) -> list[T]:
    if isinstance(data, str) and data.startswith("organism:"):
        return _of_organism(data, what)
    entries = _entries(Path(data), what) if isinstance(data, (str, Path)) else list(data)
    if not entries:
        raise BadData(f"there are no {what} in {data!r}" if isinstance(data, (str, Path)) else f"there are no {what}")
    made = []
    for number, entry in enumerate(entries):
        if isinstance(entry, kind):
            made.append(entry)
            continue
        try:
            made.append(parse(entry))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            raise BadData(f"entry {number} of the {what} cannot be used: {reason}") from None
    return made


def _entries(path: Path, what: str) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadData(f"the {what} in {path} cannot be read: {error}") from None
    try:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        entries = json.loads(text)
    except ValueError as error:
        raise BadData(f"{path} is not JSON: {error}") from None
    if not isinstance(entries, list):
        raise BadData(f"{path} should hold a list of {what}, but holds a {type(entries).__name__}")
    return entries


def _fact(entry: Mapping[str, Any]) -> Fact:
    if "requested_rewrite" in entry:
        wanted = entry["requested_rewrite"]
        answer = wanted["target_true"]["str"]
        fact = Fact(
            wanted["prompt"], wanted["subject"], answer.strip(), wanted["target_new"]["str"].strip(),
            tuple(entry.get("paraphrase_prompts", ())),
            tuple(Passage(prompt, answer.strip()) for prompt in entry.get("neighborhood_prompts", ())),
        )  # fmt: skip
    else:
        new = entry.get("new_answer")
        fact = Fact(
            str(entry["prompt"]), str(entry["subject"]), str(entry["answer"]).strip(),
            None if new is None else str(new).strip(), tuple(map(str, entry.get("paraphrases", ()))),
            tuple(Passage(str(one["prompt"]), str(one["answer"]).strip()) for one in entry.get("neighbours", ())),
        )  # fmt: skip
    if not fact.subject.strip():
        raise ValueError("the subject is empty")
    if fact.prompt.count("{}") != 1:
        raise ValueError(f"its prompt {fact.prompt!r} should have {{}} once, where the subject {fact.subject!r} stands")
    if not fact.answer:
        raise ValueError("the answer is empty")
    return fact


def _choice(entry: Mapping[str, Any]) -> Choice:
    options = [str(option) for option in entry["options"]]
    if not 2 <= len(options) <= 26:
        raise ValueError(f"there should be 2 to 26 options, got {len(options)}")
    letters = tuple(chr(ord("A") + number) for number in range(len(options)))
    answer = entry["answer"]
    answer = letters.index(answer) if isinstance(answer, str) else int(answer)
    if not 0 <= answer < len(options):
        raise ValueError(f"answer {answer} is none of the {len(options)} options")
    template = str(entry.get("template", "Question: {question} Options: {options}. Answer:"))
    return make_choice(template, str(entry["question"]), options, answer)


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


def _of_organism(name: str, what: str) -> list[Any]:
    if name != f"organism:{what}":
        raise BadData(f"{name!r} holds no {what}; expected organism:{what} or a file")
    from ..organism import World
    from .organism_questions import choices, facts, passages

    makers: dict[str, Any] = {"facts": facts, "choices": choices, "passages": passages}
    return makers[what](World())
