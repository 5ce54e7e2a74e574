"""Word substitution: the words that a classifier leans on are exchanged, one by one, for others of the same meaning.

Greedy by deletion importance, as TextFooler (Jin et al., 2020, arXiv:1907.11932), with candidates that the user names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ...errors import BadData, TransectError

Scores = Callable[[Sequence[str]], Tensor]  # of n texts, for every class: n x C
Substitutes = Callable[[str], Sequence[str]] | Mapping[str, Sequence[str]]
_WORD = re.compile(r"\w+(?:['’-]\w+)*")


@dataclass(frozen=True)
class Attacked:
    """text: what the attack came to. before, after: whether the classifier is right about the text, and still.

    changed: words that differ. words: of the text. queries: texts that were scored.
    """

    text: str
    before: bool
    after: bool
    changed: int
    words: int
    queries: int


@dataclass(frozen=True)
class Robustness:
    """clean: share of examples that are right. robust: share that is right and stays so. examples: one by one, where
    an attack has something to tell of them."""

    clean: float
    robust: float
    examples: tuple[Attacked, ...] = ()

    @staticmethod
    def of(before: Sequence[bool], after: Sequence[bool], examples: Sequence[Attacked] = ()) -> Robustness:
        """BadData if there is no example."""
        if not before:
            raise BadData("there is no example to attack")
        return Robustness(sum(before) / len(before), sum(after) / len(after), tuple(examples))


def substitution_attack(
    scores: Scores, texts: Sequence[str], labels: Sequence[int], substitutes: Substitutes, *, most: float = 0.1
) -> Robustness:
    """Attack every text that is classified rightly.

    scores: the classifier, from texts to a score of every class (n x C). labels: right classes (n).
    substitutes: of a word; a dict of lists, or a function such as `Neighbours`. most: share of a text's words that may
    be changed, rounded down.
    """
    if len(texts) != len(labels):
        raise BadData(f"there are {len(texts)} texts and {len(labels)} labels")
    if not 0 <= most <= 1:
        raise TransectError(f"the share of words that may be changed is from 0 to 1, not {most}")
    table = substitutes if not isinstance(substitutes, Mapping) else lambda word: substitutes.get(word, ())
    found = [_attack(scores, text, label, table, most) for text, label in zip(texts, labels, strict=True)]
    return Robustness.of([one.before for one in found], [one.after for one in found], found)


def _attack(
    scores: Scores, text: str, label: int, substitutes: Callable[[str], Sequence[str]], most: float
) -> Attacked:
    """Words by how much the right class loses without them; each gets the substitute by which that loses most."""
    spans = [match.span() for match in _WORD.finditer(text)]
    budget = int(most * len(spans) + 1e-9)

    def judged(variants: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Log-probability of the right class, and whether the prediction is right."""
        found = scores(variants).detach().double().cpu()
        return found.log_softmax(-1)[:, label], found.argmax(-1) == label

    likely, right = judged([text])
    queries, changed = 1, 0
    if not bool(right):
        return Attacked(text, False, False, 0, len(spans), queries)
    words = [text[start:end] for start, end in spans]
    candidates = {i: [other for other in substitutes(word) if other != word] for i, word in enumerate(words)}
    open_to_it = [i for i, others in candidates.items() if others]
    if not budget or not open_to_it:
        return Attacked(text, True, True, 0, len(spans), queries)

    def written(chosen: Mapping[int, str]) -> str:
        """The text with some of its words as chosen."""
        made, behind = "", 0
        for i, (start, end) in enumerate(spans):
            made, behind = made + text[behind:start] + chosen.get(i, words[i]), end
        return made + text[behind:]

    without, _ = judged([written({i: ""}) for i in open_to_it])
    queries += len(open_to_it)
    chosen: dict[int, str] = {}
    for place in without.argsort(stable=True).tolist():
        i = open_to_it[place]
        variants = [written({**chosen, i: other}) for other in candidates[i]]
        after, rights = judged(variants)
        queries += len(variants)
        best = int(after.argmin())
        if after[best] < likely[0]:
            chosen[i], likely, changed = candidates[i][best], after[best : best + 1], changed + 1
            right = rights[best]
        if not bool(right) or changed == budget:
            break
    return Attacked(written(chosen), True, bool(right), changed, len(spans), queries)
