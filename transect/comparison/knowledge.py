"""What rows are asked: the facts that the dense model knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..anatomy import Anatomy
from ..data import Fact, Specimen
from ..errors import NotApplicable, TransectError
from ..evaluation import says
from ..store import Folder, keep_json, kept_json
from .plan import Plan

FACTS = "facts.json"


@dataclass(frozen=True)
class Knowledge:
    """known: the facts that the dense model says by itself, of so many that it was `asked`."""

    tokenizer: Any
    known: tuple[Fact, ...]
    asked: int

    def share(self, anatomy: Anatomy) -> float:
        """The share of them that another model says too."""
        return sum(says(Specimen(anatomy, self.tokenizer), self.known)) / len(self.known)


def knowledge_of(anatomy: Anatomy, plan: Plan, folder: Folder, facts: Sequence[Fact], tokenizer: Any) -> Knowledge:
    """Ask the dense model, or read from the run folder what it said. TransectError if it knows none of the facts."""
    path, of = folder.file(FACTS), plan.of("facts", plan.facts)
    found = kept_json(path, of)
    if found is None:
        try:
            right = says(Specimen(anatomy, tokenizer), facts)
        except NotApplicable as reason:
            raise TransectError(f"facts cannot be asked: {reason}") from None
        found = {"known": [number for number, said in enumerate(right) if said]}
        keep_json(path, found, of)
    if not found["known"]:
        raise TransectError(
            f"the dense model says none of the {len(facts)} facts by itself, so that nothing can be forgotten: give "
            "others, or leave facts out"
        )
    return Knowledge(tokenizer, tuple(facts[number] for number in found["known"]), len(facts))
