"""The paper's tasks: short sequences of words with a label for the words (appendix, "RASP tasks" and "induction").

A task draws one sequence at a time: its words, and a label for each of them, None where nothing is asked. The words of
a task are `<pad>`, its symbols and marks; a sequence begins with `<s>`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from string import ascii_letters

import torch
from torch import Tensor

from ....errors import TransectError
from ....forward.objective import IGNORED

PAD, BOS, EOS, UNSEEN = "<pad>", "<s>", "</s>", "<unk>"
Row = tuple[list[str], list[str | None]]
_TRIES = 5  # sequences that are drawn for each that is wanted, before there seem to be no more different ones
_LEAST = 20  # different sequences


@dataclass(frozen=True)
class Labelled:
    """Sequences with labels. words, labels: what the ids stand for; the first word is `<pad>`.

    inputs: ids (N, T), `<pad>` behind the end. targets: ids of labels (N, T), IGNORED where nothing is asked.
    """

    words: Sequence[str]
    labels: Sequence[str]
    inputs: Tensor
    targets: Tensor

    def part(self, start: int, end: int) -> Labelled:
        """Some of the sequences."""
        return replace(self, inputs=self.inputs[start:end], targets=self.targets[start:end])

    def said(self) -> list[list[str]]:
        """The words of each sequence, without padding."""
        rows: list[list[int]] = self.inputs.tolist()
        return [[self.words[one] for one in row if one] for row in rows]


@dataclass(frozen=True)
class Task:
    """How sequences of a task are drawn.

    row: (symbols, length, random) -> one sequence of at most `length` words, with its labels.
    symbols: (vocabulary) -> those a vocabulary of that size has room for. marks: the words beside these and `<pad>`.
    labels: (symbols, length) -> all that can be asked for.
    vocabulary, length: unless others are asked for. own_words: whether the vocabulary is always that one.
    causal: whether a label depends only on what came before, so that the model need not see the rest.
    """

    row: Callable[[Sequence[str], int, Random], Row]
    symbols: Callable[[int], list[str]]
    labels: Callable[[Sequence[str], int], list[str]]
    marks: tuple[str, ...] = (BOS,)
    vocabulary: int = 8
    length: int = 8
    own_words: bool = False
    causal: bool = False

    def words(self, vocabulary: int) -> list[str]:
        """All words, by id."""
        return [PAD, *self.marks, *self.symbols(vocabulary)]


def drawn(name: str, samples: int, seed: int, vocabulary: int = 0, length: int = 0) -> Labelled:
    """Different sequences of a task, in random order: `samples`, or fewer where there are not so many.

    vocabulary, length: of words, with `<pad>` and marks; 0 for the task's own.
    Raises TransectError for an unknown task, and for a vocabulary or length that it has no sequences of.
    """
    if name not in TASKS:
        raise TransectError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    task = TASKS[name]
    vocabulary, length = vocabulary or task.vocabulary, length or task.length
    if task.own_words and vocabulary != task.vocabulary:
        raise TransectError(f"{name} always has {task.vocabulary} words, and vocabulary={vocabulary} is asked for")
    symbols, least = task.symbols(vocabulary), len(task.marks) + 1
    if len(symbols) < 2:
        raise TransectError(f"{name}: of {vocabulary} words fewer than two are symbols; raise vocabulary")
    if length <= least:
        raise TransectError(f"{name}: a sequence has more than {least} words, and length={length} is asked for")
    random, found = Random(f"{name} {seed}"), dict[tuple[str, ...], list[str | None]]()
    for _ in range(_TRIES * samples):
        said, asked = task.row(symbols, length, random)
        found.setdefault(tuple(said), asked)
        if len(found) == samples:
            break
    if len(found) < _LEAST:
        raise TransectError(
            f"{name}: {len(found)} different sequences of at most {length} words were drawn, and {_LEAST} are needed; "
            "raise samples, length or vocabulary"
        )
    words, labels = task.words(vocabulary), task.labels(symbols, length)
    rows = list(found.items())
    random.shuffle(rows)
    inputs = torch.zeros(len(rows), length, dtype=torch.long)
    targets = torch.full_like(inputs, IGNORED)
    word_ids, label_ids = ({one: i for i, one in enumerate(names)} for names in (words, labels))
    for i, (said, asked) in enumerate(rows):
        inputs[i, : len(said)] = torch.tensor([word_ids[word] for word in said])
        targets[i, : len(said)] = torch.tensor([IGNORED if one is None else label_ids[one] for one in asked])
    return Labelled(words, labels, inputs, targets)


def split(data: Labelled) -> tuple[Labelled, Labelled, Labelled]:
    """To train on, to choose a seed by, and to judge: a tenth is the last, and of the others a tenth the second."""
    tested = len(data.inputs) // 10
    chosen = (len(data.inputs) - tested) // 10
    return data.part(tested + chosen, len(data.inputs)), data.part(tested, tested + chosen), data.part(0, tested)


def _digits(marks: int) -> Callable[[int], list[str]]:
    """As many as there is room for beside `<pad>` and so many marks."""
    return lambda vocabulary: [str(number) for number in range(vocabulary - 1 - marks)]


def _counts(symbols: Sequence[str], length: int) -> list[str]:
    return [str(number) for number in range(1, length)]


def _some(symbols: Sequence[str], most: int, random: Random) -> list[str]:
    return random.choices(symbols, k=random.randint(1, most))


def _reverse(symbols: Sequence[str], length: int, random: Random) -> Row:
    said = _some(symbols, length - 2, random)
    return [BOS, *said, EOS], [None, *reversed(said), None]


def _sort(symbols: Sequence[str], length: int, random: Random) -> Row:
    said = _some(symbols, length - 2, random)
    return [BOS, *said, EOS], [None, *sorted(said, key=int), None]


def _hist(symbols: Sequence[str], length: int, random: Random) -> Row:
    """How often each word is there."""
    said = _some(symbols, length - 1, random)
    times = Counter(said)
    return [BOS, *said], [None, *(str(times[word]) for word in said)]


def _double_hist(symbols: Sequence[str], length: int, random: Random) -> Row:
    """How many different words are there as often as each."""
    said = _some(symbols, length - 1, random)
    times = Counter(said)
    alike = Counter(times.values())
    return [BOS, *said], [None, *(str(alike[times[word]]) for word in said)]


def _most_freq(symbols: Sequence[str], length: int, random: Random) -> Row:
    """The different words, the most frequent first, of equally frequent ones the earlier; `<s>` behind the last."""
    said = _some(symbols, length - 1, random)
    ranked = [word for word, _ in Counter(said).most_common()]  # keeps the order of equally common ones
    return [BOS, *said], [None, *ranked, *[BOS] * (len(said) - len(ranked))]


_PAIRS = (("(", ")"), ("{", "}"))


def _brackets(kinds: int) -> Task:
    pairs = _PAIRS[:kinds]
    return Task(
        lambda symbols, length, random: _dyck(pairs, symbols, length, random),
        lambda vocabulary: [one for pair in pairs for one in pair], lambda symbols, length: ["F", "P", "T"],
        vocabulary=2 * kinds + 2, length=16, own_words=True, causal=True,
    )  # fmt: skip


def _dyck(pairs: Sequence[tuple[str, str]], symbols: Sequence[str], length: int, random: Random) -> Row:
    """Half are balanced at first, and then random; the others random from the start.

    The balanced part has 1 to length/2 pairs, each beside or around those before it.
    """
    said: list[str] = []
    if random.random() < 0.5:
        for _ in range(random.randint(1, length // 2)):
            left, right = random.choice(pairs)
            said = [*said, left, right] if random.random() < 0.5 else [left, *said, right]
    said = (said + random.choices(symbols, k=length))[: length - 1]
    return [BOS, *said], [None, *prefix_labels(said)]


def prefix_labels(said: Sequence[str]) -> list[str]:
    """For each prefix: T if it is balanced, P if it can still become so, F if not."""
    closes, still_open, labels = {right: left for left, right in _PAIRS}, list[str](), list[str]()
    for one in said:
        if one not in closes:
            still_open.append(one)
        elif not still_open or still_open.pop() != closes[one]:
            break
        labels.append("P" if still_open else "T")
    return labels + ["F"] * (len(said) - len(labels))


def _letters_and_digits(vocabulary: int) -> list[str]:
    half = (vocabulary - 2) // 2
    return [*ascii_letters[:half], *(str(number) for number in range(half))]


def _induction(symbols: Sequence[str], length: int, random: Random) -> Row:
    """Letters, each with its digit behind it; at a letter that was there before its digit is asked for, else `<unk>`.

    Each sequence has its own digit for a letter. It either ends with one more letter or begins with a random digit.
    """
    if length % 2:
        raise TransectError(f"induction: the length should be even, not {length}")
    half = len(symbols) // 2
    letters, digits = symbols[:half], symbols[half:]
    behind = {letter: random.choice(digits) for letter in letters}
    said: list[str] = []
    asked: list[str | None] = []
    for letter in random.choices(letters, k=length // 2):
        asked += [behind[letter] if letter in said else UNSEEN, None]
        said += [letter, behind[letter]]
    if random.random() < 0.5:
        said, asked = [random.choice(digits), *said[:-2]], [None, *asked[:-2]]
    else:
        said, asked = said[:-1], asked[:-1]
    return [BOS, *said], [None, *asked]


def _digits_asked(symbols: Sequence[str], length: int) -> list[str]:
    return [UNSEEN, *symbols[len(symbols) // 2 :]]


def _themselves(symbols: Sequence[str], length: int) -> list[str]:
    return list(symbols)


TASKS = {
    "reverse": Task(_reverse, _digits(2), _themselves, (BOS, EOS)),
    "hist": Task(_hist, _digits(1), _counts),
    "double_hist": Task(_double_hist, _digits(1), _counts),
    "sort": Task(_sort, _digits(2), _themselves, (BOS, EOS)),
    "most_freq": Task(_most_freq, _digits(1), lambda symbols, length: [BOS, *symbols]),
    "dyck-1": _brackets(1),
    "dyck-2": _brackets(2),
    "induction": Task(_induction, _letters_and_digits, _digits_asked, vocabulary=10, length=10, causal=True),
}
