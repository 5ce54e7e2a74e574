"""A small world of opinions in which every word has synonyms, and a masked language model that has read about it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from ....data.batches import stacked
from ....data.masking import masked
from ....training import Machine, Problem, Run, Schedule, State, own_loss, train

CONCEPTS = 6  # of things that are liked, as many that are disliked, and as many neutral ones beside each
SYNONYMS = 6  # words of a concept, each as likely as the others
USED = 2  # of them, in the texts that a classifier is trained on
PHRASES = 5  # of a text: a neutral word, and an opinion
WORDS = {"disliked": ["bad", "awful"], "liked": ["good", "great"]}  # the last word of a text that has a verdict
TEMPLATE = "{text} it was {blank} ."
_AGREES = 0.9  # share of verdicts that are those of most phrases
_WIDTH, _LAYERS, _HEADS, _RATE, _BATCH = 64, 2, 4, 3e-3, 64
_SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]


def word(kind: str, concept: int, synonym: int) -> str:
    """Of a concept that is `liked`, `disliked`, or goes before one of these (`aliked`, `adisliked`)."""
    return f"{kind}{concept}x{synonym}"


def synonyms() -> dict[str, list[str]]:
    """Of every word of the texts, the others of its concept."""
    found = {}
    for kind in (*WORDS, *(f"a{one}" for one in WORDS)):
        for concept in range(CONCEPTS):
            together = [word(kind, concept, synonym) for synonym in range(SYNONYMS)]
            found |= {one: [other for other in together if other != one] for one in together}
    return found


def texts(count: int, seed: int, used: int = SYNONYMS) -> list[dict[str, Any]]:
    """Texts with their class, which most of their phrases decide. used: of every concept, the first so many words."""
    drawn, rows = random.Random(seed), []
    for _ in range(count):
        label = drawn.randrange(2)
        agreeing = drawn.randint(PHRASES // 2 + 1, PHRASES)
        sides = [label] * agreeing + [1 - label] * (PHRASES - agreeing)
        drawn.shuffle(sides)
        said = []
        for side in sides:
            kind, concept = tuple(WORDS)[side], drawn.randrange(CONCEPTS)
            said += [word(f"a{kind}", concept, drawn.randrange(used)), word(kind, concept, drawn.randrange(used))]
        rows.append({"text": " ".join(said), "label": label})
    return rows


@dataclass(frozen=True)
class World:
    """model: a masked language model of it. tokenizer: one token a word."""

    model: Any
    tokenizer: Any


def tokenizer() -> Any:
    """As BERT's: [CLS] text [SEP]."""
    names = [*_SPECIAL, "it", "was", ".", *(one for words in WORDS.values() for one in words), *synonyms()]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    backend.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
        unk_token="[UNK]",
    )  # fmt: skip


def untrained(seed: int) -> World:
    """A model with random weights."""
    ours = tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertForMaskedLM(BertConfig(
            vocab_size=len(ours), hidden_size=_WIDTH, intermediate_size=4 * _WIDTH, num_hidden_layers=_LAYERS,
            num_attention_heads=_HEADS, max_position_embeddings=32, pad_token_id=0, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ))  # fmt: skip
    return World(model.eval(), ours)


def pretrained(seed: int, sequences: int, steps: int) -> World:
    """The same after reading texts with all synonyms, every other one with a verdict, some tokens hidden (as BERT)."""
    world, drawn, rows = untrained(seed), random.Random(seed), []
    for number, row in enumerate(texts(sequences, 100 + seed)):
        side = row["label"] if drawn.random() < _AGREES else 1 - row["label"]
        verdict = f" it was {drawn.choice(list(WORDS.values())[side])} ." if number % 2 else ""
        rows.append({"input_ids": torch.tensor(world.tokenizer(row["text"] + verdict)["input_ids"])})
    rows.sort(key=lambda row: len(row["input_ids"]))  # one length a batch
    model = world.model
    batches = stacked(masked(rows, world.tokenizer, seed, len(world.tokenizer)), _BATCH)
    problem = Problem(
        "reading", dict(model.named_parameters()), batches, loss=lambda batch: own_loss(model, batch), measure=None,
        set_mode=model.train,
    )  # fmt: skip
    train(problem, Run(Schedule(_RATE, epochs=steps, steps=steps, seed=seed), Machine("cpu"), State(None)), {})
    model.eval()
    return world
