"""Questions about what a model knows, from files.

Each kind is a file, .json (a list) or .jsonl (one object a line), or a name: `organism:facts`, `organism:choices`,
`organism:passages` are those of the bundled model's world; `common` are facts and passages of ours that a model of
English may know, of which `transect.evaluation.says` tells what it does know, and choices made of these facts.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar

from ..errors import BadData
from ..organism.world import World
from ..parameters import listed
from .containers import items_of
from .organism_questions import choices, facts, passages
from .questions import Choice, Fact, Passage, make_choice, text_in, text_of
from .sources import json_entries

T = TypeVar("T")
COMMON = "common"
_TEMPLATE = "Question: {question} Options: {options}. Answer:"
_COMMON_FILES = Path(__file__).parent / "common"


def load_facts(data: Any) -> list[Fact]:
    """Facts from a file, a name, or objects.

    data: a path, `organism:facts`, `common` (capitals, languages, chemical symbols, authors and the like), or a list of
    `Fact`s or dicts; a data frame, a data set and a dict of columns are read as such a list. A dict has `prompt`,
    `subject`, `answer`, and perhaps `new_answer`, `paraphrases` (strings) and `neighbours` ({"prompt", "answer"}); or
    it is an entry of CounterFact (`requested_rewrite`, `paraphrase_prompts`, `neighborhood_prompts`).
    Raises BadData, naming the entry.
    """
    return _loaded(data, Fact, _fact, "facts")


def load_choices(data: Any) -> list[Choice]:
    """Multiple-choice items from a file, a name, or objects.

    data: a path, `organism:choices`, `common` (those facts, each with three answers to the same question about other
    subjects, and the right one under every letter equally often), or a list of `Choice`s or dicts.

    A dict has `question`, `options` (strings, or letter -> string), `answer` (index or letter), and perhaps `template`:
    how the prompt is written, with `{question}` and `{options}`; the options are written "A first, B second".
    """
    return _loaded(data, Choice, _choice, "choices")


def load_passages(data: Any) -> list[Passage]:
    """Passages from a file, a name, or objects.

    data: a path, `organism:passages`, `common` (famous ones in the public domain), or a list of `Passage`s or dicts
    with `prompt` and `answer`.
    """
    return _loaded(data, Passage, _passage, "passages")


def _loaded(data: Any, kind: type[T], parse: Any, what: str) -> list[T]:
    if isinstance(data, str) and data.startswith("organism:"):
        return _of_organism(data, what)
    if isinstance(data, str) and data == COMMON:
        if what == "choices":
            return _common_choices()  # type: ignore[return-value]
        data = _COMMON_FILES / f"{what}.jsonl"
    entries = (
        json_entries(Path(data), f"the {what}")
        if isinstance(data, (str, Path))
        else list(items_of(data, f"the {what}"))
    )
    if not entries:
        raise BadData(f"there are no {what} in {data!r}" if isinstance(data, (str, Path)) else f"there are no {what}")
    made = []
    for number, entry in enumerate(entries):
        if isinstance(entry, kind):
            made.append(entry)
            continue
        try:
            if not isinstance(entry, Mapping):
                raise TypeError(f"a dict is expected, not a {type(entry).__name__}")
            made.append(parse(entry))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            raise BadData(f"entry {number} of the {what} cannot be used: {reason}") from None
    return made


def _passage(entry: Mapping[str, Any]) -> Passage:
    return Passage(text_in(entry, "prompt"), text_in(entry, "answer"))


def _fact(entry: Mapping[str, Any]) -> Fact:
    if "requested_rewrite" in entry:
        wanted = entry["requested_rewrite"]
        answer = text_in(wanted["target_true"], "str").strip()
        fact = Fact(
            text_in(wanted, "prompt"), text_in(wanted, "subject"), answer, text_in(wanted["target_new"], "str").strip(),
            _strings(entry, "paraphrase_prompts"),
            tuple(Passage(prompt, answer) for prompt in _strings(entry, "neighborhood_prompts")),
        )  # fmt: skip
    else:
        fact = Fact(
            text_in(entry, "prompt"), text_in(entry, "subject"), text_in(entry, "answer").strip(),
            None if entry.get("new_answer") is None else text_in(entry, "new_answer").strip(),
            _strings(entry, "paraphrases"),
            tuple(
                Passage(text_in(one, "prompt"), text_in(one, "answer").strip())
                for one in items_of(entry.get("neighbours") or [], "`neighbours`")
            ),
        )  # fmt: skip
    if not fact.subject.strip():
        raise ValueError("the subject is empty")
    if fact.prompt.count("{}") != 1:
        raise ValueError(f"its prompt {fact.prompt!r} should have {{}} once, where the subject {fact.subject!r} stands")
    if not fact.answer:
        raise ValueError("the answer is empty")
    return fact


def _choice(entry: Mapping[str, Any]) -> Choice:
    options = _options(entry["options"])
    if not 2 <= len(options) <= 26:
        raise ValueError(f"there should be 2 to 26 options, got {len(options)}")
    letters = tuple(chr(ord("A") + number) for number in range(len(options)))
    answer = entry["answer"]
    answer = letters.index(answer) if answer in letters else answer
    if not isinstance(answer, Integral) or isinstance(answer, bool) or int(answer) not in range(len(options)):
        raise ValueError(f"answer {answer!r} is none of the {len(options)} options: neither their number nor a letter")
    template = _TEMPLATE
    if entry.get("template"):
        template = text_in(entry, "template")
    return make_choice(template, text_in(entry, "question"), options, int(answer))


def _common_choices() -> list[Choice]:
    """The common facts, each beside answers that are right of its neighbours."""
    made: list[Choice] = []
    for fact in load_facts(COMMON):
        others = dict.fromkeys([one.answer for one in fact.neighbours] + [str(fact.new_answer)])
        options = [answer for answer in others if answer != fact.answer][:3]
        if len(options) == 3:
            place = len(made) % 4
            options.insert(place, fact.answer)
            made.append(make_choice(_TEMPLATE, f"{fact.prompt.format(fact.subject)} ...", options, place))
    return made


def _strings(entry: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """The strings in a column that may be missing; one string is one, and not its letters."""
    return tuple(text_of(item, name) for item in listed(entry.get(name) or ()))


def _options(given: Any) -> list[str]:
    """The options' texts in the order of their letters."""
    if isinstance(given, Mapping):
        letters = [chr(ord("A") + number) for number in range(len(given))]
        if list(given) != letters:
            raise ValueError(f"options in a dict go by their letters, {', '.join(letters)}, not {list(given)}")
        given = given.values()
    if hasattr(given, "tolist"):  # an array
        given = given.tolist()
    if isinstance(given, str):
        raise ValueError(f"its options should be a list of strings, not the one string {given!r}")
    return [text_of(option, "options") for option in given]


def _of_organism(name: str, what: str) -> list[Any]:
    if name != f"organism:{what}":
        raise BadData(f"{name!r} holds no {what}; expected organism:{what} or a file")
    makers: dict[str, Any] = {"facts": facts, "choices": choices, "passages": passages}
    return makers[what](World())
