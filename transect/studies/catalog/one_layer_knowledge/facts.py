"""Facts in several wordings, questions about them, and who is asked about: a pure function of the seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from ....errors import TransectError
from ....organism import World
from ....organism.words import WordMaker


class Rows(NamedTuple):
    """What is asked and what is right. tokens: subject and template or question (..., 2). answers: ids (...)."""

    tokens: Tensor
    answers: Tensor


def generator_of(use: str, seed: int) -> torch.Generator:
    """Random numbers of one use, which do not depend on how many another one takes."""
    return torch.Generator().manual_seed(Random(f"{use} {seed}").getrandbits(63))


@dataclass(frozen=True)
class Facts:
    """One answer for each of N subjects and A attributes; R templates an attribute; a question token an attribute.

    wordings: of every fact the numbers of its attribute's templates in an order of its own (N, A, R). With
    multiplicity K a fact is told in the first K, so what K adds is added to the same data.
    order: the subjects in the order in which they are fine-tuned (N): the first of them, so that more are a superset.

    Ids: subjects, templates (attribute-major), questions, answers (subject-major). An answer belongs to one fact alone.
    """

    subjects: int
    attributes: int
    templates: int
    seed: int
    wordings: Tensor = field(init=False, repr=False, compare=False)
    order: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if min(self.subjects, self.attributes, self.templates) < 1:
            raise TransectError(
                f"facts have 1 or more subjects, attributes and templates, got {self.subjects}, {self.attributes} and "
                f"{self.templates}"
            )
        shape = (self.subjects, self.attributes, self.templates)
        drawn = torch.rand(shape, generator=generator_of("wordings", self.seed), dtype=torch.float64)
        order = torch.randperm(self.subjects, generator=generator_of("order", self.seed))
        object.__setattr__(self, "wordings", drawn.argsort(-1))
        object.__setattr__(self, "order", order)

    @property
    def first_question(self) -> int:
        """The id of attribute 0's question."""
        return self.subjects + self.attributes * self.templates

    @property
    def first_answer(self) -> int:
        """The id of the answer of subject 0 and attribute 0."""
        return self.first_question + self.attributes

    @property
    def vocabulary(self) -> int:
        """How many ids there are."""
        return self.first_answer + self.subjects * self.attributes

    def statements(self, multiplicity: int, subjects: Tensor | None = None) -> Rows:
        """Each fact in its first K templates: (n, A, K, 2) and (n, A, K). subjects: of these (n); default of all.

        TransectError for more wordings than an attribute has templates, or none.
        """
        if not 1 <= multiplicity <= self.templates:
            raise TransectError(
                f"multiplicity {multiplicity}: a fact is told in 1 to {self.templates} different templates, as many as "
                "there are of its attribute; raise templates, or lower the multiplicity"
            )
        who, what = self._of(subjects)
        start = self.subjects + self.templates * torch.arange(self.attributes)[:, None]
        templates = start + self.wordings[who[:, 0], :, :multiplicity]
        pair = torch.stack([who[..., None].expand_as(templates), templates], -1)
        return Rows(pair, self._answers(who, what)[..., None].expand_as(templates))

    def questions(self, subjects: Tensor | None = None) -> Rows:
        """Each fact behind its attribute's question token: (n, A, 2) and (n, A)."""
        who, what = self._of(subjects)
        return Rows(torch.stack([who, self.first_question + what], -1), self._answers(who, what))

    def split(self, tuned: int) -> tuple[Tensor, Tensor]:
        """The subjects that are fine-tuned, and those that are asked about (held out).

        TransectError where one of the two would be empty.
        """
        if not 1 <= tuned < self.subjects:
            raise TransectError(
                f"{tuned} fine-tuned subjects of {self.subjects}: at least one, and at least one must be left to be "
                "asked about; raise subjects, or fine-tune fewer"
            )
        return self.order[:tuned], self.order[tuned:]

    def coverage(self, multiplicity: int, tuned: int) -> float:
        """The share of an attribute's templates in which some fine-tuned subject was told of; mean over attributes."""
        told = self.wordings[self.split(tuned)[0], :, :multiplicity].transpose(0, 1).flatten(1)  # (A, N_f K)
        return sum(len(one.unique()) for one in told) / (self.attributes * self.templates)

    def words(self) -> list[str]:
        """A name for every id: the bundled world's subjects and relations as far as they go, invented ones behind."""
        world, names = World(), WordMaker(Random(f"words {self.seed}"))
        subjects = [*world.entities, *(word.capitalize() for word in names.draw(self.subjects))][: self.subjects]
        kinds = [one.name for one in world.relations]
        kinds = (kinds + [f"attribute-{number}" for number in range(len(kinds), self.attributes)])[: self.attributes]
        templates = [f"{kind}/{number}" for kind in kinds for number in range(self.templates)]
        return [*subjects, *templates, *(f"{kind}?" for kind in kinds), *names.draw(self.subjects * self.attributes)]

    def _of(self, subjects: Tensor | None) -> tuple[Tensor, Tensor]:
        chosen = torch.arange(self.subjects) if subjects is None else subjects
        shape = (len(chosen), self.attributes)
        return chosen[:, None].expand(shape), torch.arange(self.attributes).expand(shape)

    def _answers(self, who: Tensor, what: Tensor) -> Tensor:
        return self.first_answer + who * self.attributes + what


def side_by_side(rows: Sequence[Rows], times: int = 1) -> Rows:
    """Rows of several models, each flattened: (times x models, B, 2) and (times x models, B)."""
    tokens = torch.stack([one.tokens.flatten(0, -2) for one in rows]).repeat(times, 1, 1)
    return Rows(tokens, torch.stack([one.answers.flatten() for one in rows]).repeat(times, 1))


def told(facts: Facts, multiplicity: int, tuned: int) -> str:
    """The data in words, a line a row: what is pretrained, fine-tuned and held out."""
    words, (first, others) = facts.words(), facts.split(tuned)
    parts = {
        "pretraining": facts.statements(multiplicity), "fine-tuning": facts.questions(first),
        "held out": facts.questions(others),
    }  # fmt: skip
    lines = [
        f"{part}\t{' '.join(words[token] for token in pair)}\t{words[answer]}"
        for part, rows in parts.items()
        for pair, answer in zip(rows.tokens.flatten(0, -2).tolist(), rows.answers.flatten().tolist(), strict=True)
    ]
    return "\n".join(lines) + "\n"
