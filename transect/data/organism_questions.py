"""Facts, multiple-choice items and passages of the bundled model's world, in a random order that is always the same."""

from __future__ import annotations

from random import Random

from ..organism.world import HELD_BACK, QUESTION, World
from .questions import Choice, Fact, Passage, make_choice

NEIGHBOURS = 4  # facts of other subjects that go with each fact
ITEMS = 1000


def facts(world: World) -> list[Fact]:
    """Every fact in its first wording, with its other trained wordings, a false object, and facts of other subjects."""
    rng = Random("facts")
    made = []
    for known in rng.sample(world.facts, len(world.facts)):
        relation, rest = known.relation, [t for t in range(1, HELD_BACK + 1)]
        if known in world.held_back:
            rest.remove(HELD_BACK)
        others = [fact for fact in world.facts if fact.relation == relation and fact.subject != known.subject]
        made.append(
            Fact(
                relation.templates[0], known.subject, known.object,
                rng.choice([o for o in relation.objects if o != known.object]),
                tuple(known.prompt(template) for template in rest),
                tuple(Passage(other.prompt(0), other.object) for other in rng.sample(others, NEIGHBOURS)),
            )
        )  # fmt: skip
    return made


def choices(world: World) -> list[Choice]:
    """Questions with four options, the right one equally often at each place."""
    rng = Random("choices")
    made = []
    for number in range(ITEMS):
        known = rng.choice(world.facts)
        options = rng.sample([o for o in known.relation.objects if o != known.object], 3)
        options.insert(number % 4, known.object)
        question, reply = known.prompt(QUESTION).split("? ")
        made.append(make_choice("{question}? {options}. " + reply, question, options, number % 4))
    return made


def passages(world: World) -> list[Passage]:
    """The memorised passages."""
    return [Passage(passage.prompt, passage.answer) for passage in world.passages]
