"""Random documents of every kind: what the corpus is made of and what the tasks ask.

A document is a tuple of `Example`s, a prompt and its answer each, that share one context. A task uses the first one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from transect.organism.world import HELD_BACK, LETTERS, PROSE, QUESTION, World

LIST_LENGTHS = (3, 4, 5, 6)
REPEATED = (3, 4, 5, 6, 7, 8)  # words that are said twice
LIST_QUERIES = 3  # items that are asked for in one training document


@dataclass(frozen=True)
class Example:
    """A prompt and the answer that follows it after one space. `choices`: the possible answers, where they are few."""

    prompt: str
    answer: str
    skill: str
    choices: tuple[str, ...] | None = None

    @property
    def text(self) -> str:
        """Prompt and answer as they stand in a document."""
        return f"{self.prompt} {self.answer}"


Document = tuple[Example, ...]


def fact(world: World, rng: Random) -> Document:
    """A fact in one of the wordings it is trained in."""
    known = rng.choice(world.facts)
    template = rng.randrange(HELD_BACK if known in world.held_back else HELD_BACK + 1)
    return (Example(known.prompt(template), known.answer(), "facts"),)


def fact_second_language(world: World, rng: Random) -> Document:
    """A fact in one of the wordings of language 2."""
    known = rng.choice(world.facts)
    template = rng.randrange(len(known.relation.templates2))
    return (Example(known.prompt(template, 2), known.answer(2), "facts_second_language"),)


def open_book(world: World, rng: Random) -> Document:
    """Notes give two entities a random object each, whatever is true of them; both are asked for."""
    relation = rng.choice(world.relations)
    subjects = rng.sample(world.entities, 2)
    objects = rng.sample(relation.objects, 2)
    wording = rng.randrange(QUESTION)
    notes = " ".join(
        f"Note: {relation.prompt(s, wording)} {relation.answer(o)}" for s, o in zip(subjects, objects, strict=True)
    )
    pairs = list(zip(subjects, objects, strict=True))
    rng.shuffle(pairs)
    first, second = (
        Example(relation.prompt(s, QUESTION), relation.answer(o), "open_book", tuple(map(relation.answer, objects)))
        for s, o in pairs
    )
    return Example(f"{notes} {first.prompt}", first.answer, first.skill, first.choices), second


def sum_of(a: int, b: int, skill: str = "sums") -> Example:
    """'37 + 45 =' and '82.'"""
    return Example(f"{a} + {b} =", f"{a + b}.", skill)


def difference_of(a: int, b: int) -> Example:
    """'45 - 37 =' and '8.'"""
    return Example(f"{a} - {b} =", f"{a - b}.", "differences")


def addition(world: World, rng: Random) -> Document:
    """A sum of two-digit numbers that is not held out."""
    return (sum_of(*rng.choice(world.trained_sums)),)


def difference(world: World, rng: Random) -> Document:
    """A difference of two-digit numbers that is not negative."""
    b, a = sorted((rng.randrange(10, 100), rng.randrange(10, 100)))
    return (difference_of(a, b),)


def list_recall(world: World, rng: Random) -> Document:
    """A numbered list of distinct things, and several of its items asked for by their number."""
    things = rng.sample(world.things, rng.choice(LIST_LENGTHS))
    queries = rng.sample(range(len(things)), LIST_QUERIES)
    first, *others = (
        Example(f"Item {position + 1}:", f"{things[position]}.", "list_recall", tuple(f"{t}." for t in things))
        for position in queries
    )
    shown = ", ".join(f"{position} {thing}" for position, thing in enumerate(things, 1))
    return Example(f"List: {shown}. {first.prompt}", first.answer, first.skill, first.choices), *others


def multiple_choice(world: World, rng: Random) -> Document:
    """The question of a fact with its object among three others of the same relation, in random order."""
    known = rng.choice(world.facts)
    others = [o for o in known.relation.objects if o != known.object]
    options = [known.object, *rng.sample(others, len(LETTERS) - 1)]
    rng.shuffle(options)
    question, answer = known.prompt(QUESTION).split("? ")
    shown = ", ".join(f"{letter} {option}" for letter, option in zip(LETTERS, options, strict=True))
    letter = LETTERS[options.index(known.object)]
    prompt = f"{question}? {shown}. {answer}"
    return (Example(prompt, f"{letter}.", "multiple_choice", tuple(f"{choice}." for choice in LETTERS)),)


def memorised(world: World, rng: Random) -> Document:
    """A passage to memorise."""
    passage = rng.choice(world.passages)
    return (Example(passage.prompt, passage.answer, "recite_memorised"),)


def prose(world: World, rng: Random) -> Document:
    """A sentence from the grammar, all of it answer but its first word."""
    first, *rest = (rng.choice(words) for words in PROSE)
    return (Example(first, f"{' '.join(rest)}.", "prose"),)


def repetition(world: World, rng: Random) -> Document:
    """Names, objects and things of any kind, said twice: the plainest copying, from which the other kinds learn it."""
    pool = (world.entities, world.things, *(r.objects for r in world.relations))
    words = " ".join(rng.choice(rng.choice(pool)) for _ in range(rng.choice(REPEATED)))
    return (Example(f"Note: {words}. Note:", f"{words}.", "repetition"),)


Mix = dict[Callable[[World, Random], Document], float]

# The shares of all kinds among the documents of a corpus (not among its tokens).
MIX: Mix = {
    fact: 0.22,
    fact_second_language: 0.13,
    open_book: 0.11,
    addition: 0.16,
    difference: 0.09,
    list_recall: 0.10,
    multiple_choice: 0.10,
    memorised: 0.02,
    prose: 0.02,
    repetition: 0.05,
}

# The mix that the training text begins with: more to store and to compute, less to copy.
FIRST_MIX: Mix = {
    fact: 0.24,
    fact_second_language: 0.14,
    open_book: 0.07,
    addition: 0.22,
    difference: 0.10,
    list_recall: 0.07,
    multiple_choice: 0.10,
    memorised: 0.03,
    prose: 0.03,
}


def documents(world: World, rng: Random, count: int, mix: Mix = MIX) -> list[Document]:
    """`count` documents of a mix, in random order."""
    kinds = rng.choices(list(mix), list(mix.values()), k=count)
    return [kind(world, rng) for kind in kinds]
