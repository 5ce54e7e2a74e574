"""The ground truth: entities and their facts in two languages, sums that are held out, passages to memorise.

`World(seed)` is a pure function of its seed. Language 1 frames invented names in plain English words; language 2 has
its own words for everything but the names of the entities. A fact is put into words by a *template*, the text that
precedes its object, so that prompt and answer are always `template` and `object.`.

Templates 0 to 2 of language 1 are trained for every fact. Template 3 is the held-back paraphrase: it is trained for
one random half of the facts (which teaches what the wording means) and evaluated on the other half, whose facts the
model has never seen worded like that.
"""

from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from random import Random

from transect.organism.words import WordMaker

N_ENTITIES = 200
N_OBJECTS = 24  # candidate objects of one relation
N_THINGS = 96  # words that lists and passages are made of
N_PASSAGES = 120  # memorised, and as many unseen
PASSAGE_PREFIX = 4  # words of a passage that are given in the prompt
PASSAGE_WORDS = 24  # words of a passage in all
LETTERS = ("A", "B", "C", "D")
QUESTION = 2  # index of the template that asks
HELD_BACK = 3  # index of the paraphrase that half of the facts are never trained in

# One entry a relation: its name and four templates of language 1.
_TEMPLATES = {
    "home": (
        "The home of {} is",
        "{} lives in",
        "Question: where does {} live? Answer:",
        "If you seek {}, travel to",
    ),
    "craft": (
        "The craft of {} is",
        "{} earns bread by",
        "Question: what work does {} do? Answer:",
        "Ask {} for help with",
    ),
    "beast": (
        "The beast of {} is",
        "{} walks beside a",
        "Question: which animal does {} keep? Answer:",
        "At the gate of {} waits a",
    ),
    "dish": (
        "The dish of {} is",
        "{} always eats",
        "Question: what does {} like most? Answer:",
        "On the table of {} you find",
    ),
}

# Prose: article adjective noun verb adverb preposition article noun.
PROSE = (
    ("The", "A", "One", "Every", "Some", "This", "That", "No"),
    ("old", "young", "quiet", "tall", "tired", "clever", "gentle", "proud", "small", "brave"),
    ("miller", "sailor", "weaver", "shepherd", "teacher", "singer", "farmer", "smith", "child", "widow"),
    ("walks", "runs", "looks", "returns", "climbs", "rides", "moves", "drifts", "hurries", "wanders"),
    ("slowly", "early", "gladly", "often", "late", "again", "softly", "alone"),
    ("to", "past", "from", "toward", "behind", "around"),
    ("the", "a", "one", "every", "some", "this"),
    ("river", "forest", "village", "bridge", "market", "tower", "garden", "harbour", "meadow", "valley"),
)

_RESERVED = frozenset(" ".join(sum(_TEMPLATES.values(), ()) + sum(PROSE, ())).lower().split())


@dataclass(frozen=True)
class Relation:
    """A relation, its wordings and its possible objects; `objects2[i]` translates `objects[i]`."""

    name: str
    templates: tuple[str, ...]
    templates2: tuple[str, ...]
    objects: tuple[str, ...]
    objects2: tuple[str, ...]

    def prompt(self, subject: str, template: int = 0, language: int = 1) -> str:
        """The words before the object, e.g. 'The home of Karo is'."""
        return (self.templates if language == 1 else self.templates2)[template].format(subject)

    def answer(self, obj: str, language: int = 1) -> str:
        """The object (given in language 1) with its full stop, e.g. 'mirel.'."""
        return f"{obj if language == 1 else self.objects2[self.objects.index(obj)]}."


@dataclass(frozen=True)
class Fact:
    """`subject` stands in `relation` to `object`; `object` is the word of language 1."""

    subject: str
    relation: Relation
    object: str

    def prompt(self, template: int = 0, language: int = 1) -> str:
        """The words before the object, e.g. 'The home of Karo is'."""
        return self.relation.prompt(self.subject, template, language)

    def answer(self, language: int = 1) -> str:
        """The object with its full stop in the language asked for."""
        return self.relation.answer(self.object, language)

    @property
    def object2(self) -> str:
        """The object in language 2."""
        return self.answer(language=2).rstrip(".")


@dataclass(frozen=True)
class Passage:
    """Random words under a three-digit number; the prompt gives the number and the first words."""

    number: int
    words: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The number and the first words."""
        return f"Record {self.number}: {' '.join(self.words[:PASSAGE_PREFIX])}"

    @property
    def answer(self) -> str:
        """The other words."""
        return f"{' '.join(self.words[PASSAGE_PREFIX:])}."


@dataclass(frozen=True)
class World:
    """Everything that is true in the world of one seed.

    entities: names, capitalised. relations: see `Relation`. facts: one for each entity and relation, entity-major.
    things: words of lists and passages. passages / unseen_passages: memorised, and never shown.
    held_back: facts never trained in template `HELD_BACK`. held_out_sums: pairs (a, b), symmetric, never trained.
    """

    seed: int = 0
    entities: tuple[str, ...] = field(init=False)
    relations: tuple[Relation, ...] = field(init=False)
    facts: tuple[Fact, ...] = field(init=False)
    things: tuple[str, ...] = field(init=False)
    passages: tuple[Passage, ...] = field(init=False)
    unseen_passages: tuple[Passage, ...] = field(init=False)
    held_back: frozenset[Fact] = field(init=False)
    held_out_sums: frozenset[tuple[int, int]] = field(init=False)

    def __post_init__(self) -> None:
        rng = Random(self.seed)
        maker = WordMaker(rng, _RESERVED)
        entities = tuple(word.capitalize() for word in maker.draw(N_ENTITIES))
        relations = _relations(maker)
        facts = tuple(Fact(e, r, rng.choice(r.objects)) for e in entities for r in relations)
        things = maker.draw(N_THINGS)
        numbers = rng.sample(range(100, 1000), 2 * N_PASSAGES)
        passages = tuple(Passage(number, tuple(rng.choices(things, k=PASSAGE_WORDS))) for number in numbers)
        unordered = [(a, b) for a in range(10, 100) for b in range(a, 100)]
        held_out = rng.sample(unordered, len(unordered) // 10)
        values = {
            "entities": entities,
            "relations": relations,
            "facts": facts,
            "things": things,
            "passages": passages[:N_PASSAGES],
            "unseen_passages": passages[N_PASSAGES:],
            "held_back": frozenset(rng.sample(facts, len(facts) // 2)),
            "held_out_sums": frozenset(held_out + [(b, a) for a, b in held_out]),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @cached_property
    def trained_sums(self) -> tuple[tuple[int, int], ...]:
        """The pairs (a, b) of two-digit numbers that may occur in a corpus."""
        return tuple((a, b) for a in range(10, 100) for b in range(10, 100) if (a, b) not in self.held_out_sums)

    def first(self, entities: int) -> "World":
        """The same world with only its first `entities` entities and their facts."""
        part = copy(self)
        object.__setattr__(part, "entities", self.entities[:entities])
        object.__setattr__(part, "facts", self.facts[: entities * len(self.relations)])
        return part


def _relations(maker: WordMaker) -> tuple[Relation, ...]:
    """The relations of `_TEMPLATES`, with invented objects and the invented wordings of language 2."""
    of, is_, ask, reply = maker.draw(4, second_language=True)
    relations = []
    for name, templates in _TEMPLATES.items():
        noun, verb, query = maker.draw(3, second_language=True)
        templates2 = (f"{noun} {of} {{}} {is_}", f"{{}} {verb}", f"{ask}: {query} {{}}? {reply}:")
        objects = maker.draw(N_OBJECTS)
        objects2 = maker.draw(N_OBJECTS, second_language=True)
        relations.append(Relation(name, templates, templates2, objects, objects2))
    return tuple(relations)
