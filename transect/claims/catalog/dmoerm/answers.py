"""Made-up answers whose worth is known: five aspects, two kinds of task that weigh them differently, noisy judges.

An answer is a string of words, perhaps with an end marker. Sizes are our choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from random import Random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from ....data import Preference

WORDS, LONGEST = 16, 12  # words of answers; of an answer, the end marker left out
PROMPT_WORDS, PROMPT = 8, 4  # words of each category's prompts; of a prompt
TARGET = 6  # the length that is best
STICKY = 0.3  # chance that a word is the one before it
NOISE = 0.3  # chance that a judge names the wrong answer
END = "end"
CATEGORIES = ("first", "second")
ASPECTS = ("length", "allowed", "repetition", "order", "end")
WEIGHTS = {"first": (1.0, 1.0, 0.5, 0.5, 1.0), "second": (-1.0, 0.5, 1.0, 1.0, 0.5)}  # opposite on length

_VOCABULARY = [
    "pad", END, *(f"w{i}" for i in range(WORDS)),
    *(f"{category}{i}" for category in CATEGORIES for i in range(PROMPT_WORDS)),
]  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """pairs: without an aspect, of each category; of_aspect: of each category and aspect. judged: clean pairs a
    category to measure accuracy on. prompts, answers: of each category, and of each prompt, for best of n.
    epochs: over the pairs, in each phase.
    """

    pairs: int = 3000
    of_aspect: int = 1000
    judged: int = 1000
    prompts: int = 16
    answers: int = 384
    epochs: int = 4


def backbone(seed: int) -> tuple[BertForMaskedLM, PreTrainedTokenizerFast]:
    """A random encoder of two layers, and the tokenizer of these words."""
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(_VOCABULARY)}, "pad"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = BertConfig(
        vocab_size=len(_VOCABULARY), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, pad_token_id=0, initializer_range=0.15,  # about 1 / root of the width
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForMaskedLM(config).eval(), PreTrainedTokenizerFast(tokenizer_object=words)


def prompt_of(generator: Random, category: str) -> str:
    """A prompt of words that its category has alone."""
    return " ".join(f"{category}{generator.randrange(PROMPT_WORDS)}" for _ in range(PROMPT))


def answer_of(generator: Random) -> str:
    """An answer of any length, with an end marker half of the time."""
    words = [generator.randrange(WORDS)]
    for _ in range(generator.randrange(LONGEST)):
        words.append(words[-1] if generator.random() < STICKY else generator.randrange(WORDS))
    return "".join(f" w{word}" for word in words) + (f" {END}" if generator.random() < 0.5 else "")


def aspects_of(answer: str) -> tuple[float, ...]:
    """How good an answer is in each aspect, each about as spread as the others.

    In the order of ASPECTS: nearness of its length to TARGET; share of the first half of the words; no word repeated
    behind itself; share of neighbours that rise; whether it ends in the marker.
    """
    parts = answer.split()
    words = [int(part[1:]) for part in parts if part != END]
    pairs = list(pairwise(words)) or [(0, 0)]
    return (
        -abs(len(words) - TARGET) / 1.7,
        sum(word < WORDS // 2 for word in words) / len(words) / 0.25,
        -sum(one == other for one, other in pairs) / len(pairs) / 0.25,
        sum(one < other for one, other in pairs) / len(pairs) / 0.25,
        float(parts[-1] == END) / 0.5,
    )


def worth(category: str, answer: str) -> float:
    """The true reward."""
    return sum(weight * value for weight, value in zip(WEIGHTS[category], aspects_of(answer), strict=True))


def pairs_of(category: str, count: int, seed: int, aspect: str | None = None, noise: float = 0.0) -> list[Preference]:
    """Preferences by the true reward, or by an aspect, of which a share `noise` is turned round."""
    generator, made = Random(f"{category} {aspect} {seed}"), []
    while len(made) < count:
        prompt, answers = prompt_of(generator, category), (answer_of(generator), answer_of(generator))
        scores = [
            worth(category, answer) if aspect is None else aspects_of(answer)[ASPECTS.index(aspect)]
            for answer in answers
        ]
        if scores[0] == scores[1]:
            continue
        first = (scores[0] > scores[1]) != (generator.random() < noise)
        better, worse = answers if first else answers[::-1]
        made.append(Preference(prompt, better, worse, category, aspect))
    return made
