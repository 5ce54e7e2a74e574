"""Text of a fixed rhythm: sentences of equally many units, in orders that keep or break their structure.

A unit is a word (or a character, where a language writes no spaces) and one sample of the signal, at 4 units a second
by the paper's convention, so that sentences of four units come at 1 Hz and phrases of two at 2 Hz.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

import torch
from torch import Tensor

from ....data import Specimen
from ....data.sources import rows_of
from ....errors import BadData, NotApplicable
from ...words import Ids, word_tokens

Control = Literal["words", "classes", "phrases"]
Order = Literal["experiment", "words", "classes", "phrases"]
UNITS_A_SECOND = 4
SHORTEST, LONGEST = 4, 16  # units of a sentence
LEAST_UNITS = 16  # of a signal
LEAST_WORDS = 8  # of each kind that the tokenizer must have as one token

# Adjective noun | verb adverb: a subject phrase and a predicate phrase of two words each. Any choice is grammatical.
SLOTS = {
    "adjectives": (
        "old young quiet tall tired clever gentle proud small brave big bad sad happy angry poor rich strong weak wise "
        "kind cruel calm loud blind lonely lazy nervous curious careful famous local foreign"
    ),
    "nouns": (
        "miller sailor weaver shepherd teacher singer farmer smith child widow dog cat bird horse man woman boy girl "
        "king queen doctor soldier driver writer student nurse lawyer artist player hunter priest baker painter"
    ),
    "verbs": (
        "walks runs looks returns climbs rides moves drifts hurries wanders speaks sings works plays sleeps waits "
        "falls stands sits stays leaves arrives swims flies jumps smiles laughs cries writes reads thinks dances fights"
    ),
    "adverbs": (
        "slowly early gladly often late again softly alone quickly quietly together today here there outside inside "
        "away home daily twice already forever everywhere suddenly carefully loudly badly well soon"
    ),
}


@dataclass(frozen=True)
class Stimuli:
    """Sentences as token ids, of equally many units.

    units: of all sentences, one after another. size: units of a sentence. skip: how many of the sentences that are read
    first do not count.
    """

    units: Sequence[Ids]
    size: int
    skip: int = 1

    @property
    def sentences(self) -> int:
        """That count."""
        return len(self.units) // self.size - self.skip

    @property
    def samples(self) -> int:
        """T: units that count. A multiple of `size`, so the sentence rate is a frequency of the transform."""
        return self.sentences * self.size

    @property
    def rates(self) -> dict[str, float]:
        """Frequencies in Hz: first that of sentences, 4 / size, then those of phrases.

        A sentence of four units has phrases of two. Of longer ones, any length from two units to one less than the
        sentence may be a phrase, as in the paper's natural texts.
        """
        lengths = [2] if self.size == SHORTEST else range(self.size - 1, 1, -1)
        return {"sentence": UNITS_A_SECOND / self.size} | {
            f"phrase of {length}": UNITS_A_SECOND / length for length in lengths
        }

    @property
    def bins(self) -> list[int]:
        """The nearest frequency of the transform for each of `rates`."""
        return [round(rate * self.samples / UNITS_A_SECOND) for rate in self.rates.values()]

    @property
    def exact(self) -> bool:
        """Whether all rates are frequencies of the transform."""
        products = [rate * self.samples / UNITS_A_SECOND for rate in self.rates.values()]
        return all(abs(product - round(product)) < 1e-6 for product in products)

    def read(self, order: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids of the units in an order, and the place in it that each token belongs to."""
        ids = [self.units[number] for number in order.tolist()]
        owners = torch.arange(len(ids)).repeat_interleave(torch.tensor([len(one) for one in ids]))
        return torch.tensor([token for one in ids for token in one]), owners


def own_sentences(specimen: Specimen, count: int, seed: int) -> list[list[Ids]]:
    """So many sentences of four words that are one token each, from our lists; NotApplicable where too few are."""
    random, slots = Random(seed), []
    for kind, words in SLOTS.items():
        found = Counter(word_tokens(specimen, words.split()).values())
        known = [ids for ids, words_of_it in found.items() if len(ids) == 1 and words_of_it == 1]  # else it is unknown
        if len(known) < LEAST_WORDS:
            raise NotApplicable(
                f"of its {len(words.split())} English {kind} this tokenizer has {len(known)} as one token, and "
                f"{LEAST_WORDS} are needed; pass sentences of your own (--hftp.sentences FILE)"
            )
        drawn: list[Ids] = []
        while len(drawn) < count:  # each word once before one comes again
            drawn += random.sample(known, len(known))
        slots.append(drawn[:count])
    return [list(words) for words in zip(*slots, strict=True)]


def sentences_of(specimen: Specimen, path: str) -> list[list[Ids]]:
    """Sentences of a text file, one a line. Raises BadData where they have not equally many units."""
    if Path(path).suffix != ".txt":
        raise BadData(f"the sentences should be a .txt file with one a line, got {path!r}")
    lines = ["".join(c for c in line if c.isalnum() or c.isspace()).strip() for line in _lines(path)]
    lines = [line for line in lines if line]
    if not lines:
        raise BadData(f"{path} holds no sentence")
    space = any(" " in line for line in lines)
    cut = [line.split() if space else list(line) for line in lines]
    for number, units in enumerate(cut, 1):
        if len(units) != len(cut[0]) or not SHORTEST <= len(units) <= LONGEST:
            raise BadData(
                f"sentence {number} of {path}, {lines[number - 1]!r}, has {len(units)} units: every sentence must have "
                f"the same number, from {SHORTEST} to {LONGEST} words (or characters, where nothing has a space), and "
                f"the first has {len(cut[0])}"
            )
    found = word_tokens(specimen, (unit for units in cut for unit in units), space)
    unknown = [unit for unit, ids in found.items() if not ids]
    if unknown:
        raise BadData(
            f"{len(unknown)} words of {path} are not in the tokenizer's vocabulary, such as {', '.join(unknown[:5])}"
        )
    return [[found[unit] for unit in units] for units in cut]


def _lines(path: str) -> list[str]:
    return [line for row in rows_of(Path(path), 0) for line in row["text"].splitlines()]


def fitted(specimen: Specimen, sentences: Sequence[Sequence[Ids]], skip: int) -> Stimuli:
    """As many of the sentences as the model's context takes; NotApplicable where they are too few for a signal."""
    context = getattr(specimen.anatomy.config, "max_position_embeddings", None)
    kept, tokens = [], 0
    for sentence in sentences:
        tokens += sum(map(len, sentence))
        if context is not None and tokens > context:
            break
        kept.append(sentence)
    size = len(sentences[0])
    found = Stimuli([unit for sentence in kept for unit in sentence], size, skip)
    if found.samples < LEAST_UNITS:
        raise NotApplicable(
            f"its signal needs {LEAST_UNITS} units behind the first {skip} sentences; the sentences and the model's "
            f"context of {context} tokens give {max(found.samples, 0)}"
        )
    return found


def orders(stimuli: Stimuli, kind: Order, count: int, generator: torch.Generator) -> list[Tensor]:
    """Orders of the units (each n), all of one group, for the experiment or a control.

    experiment: sentences in random order, each as it is. words: sentences stay in their places, and in each the units
    are permuted so that none is directly followed by the one behind it (the paper's control). classes: sentences in
    random order, one such permutation for all, so that kinds of words keep the rhythm without the grammar. phrases:
    phrases of two units in random order, so that nothing has the rhythm of sentences.
    """
    places = torch.arange(len(stimuli.units))
    sentences = places.view(-1, stimuli.size)
    if kind == "words":
        inner = [[broken(stimuli.size, generator) for _ in sentences] for _ in range(count)]
        return [sentences.gather(1, torch.stack(one)).flatten() for one in inner]
    if kind == "phrases":
        sentences = places.view(-1, 2)
    elif kind == "classes":
        sentences = sentences[:, broken(stimuli.size, generator)]
    return [sentences[torch.randperm(len(sentences), generator=generator)].flatten() for _ in range(count)]


def broken(size: int, generator: torch.Generator) -> Tensor:
    """A random order of 0 ... size - 1 in which no number is directly followed by the next one."""
    while True:
        order = torch.randperm(size, generator=generator)
        if not bool((order.diff() == 1).any()):
            return order
