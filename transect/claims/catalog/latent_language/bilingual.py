"""A small model of two languages with one grammar, of which one may dominate, and a third with fewer words.

Languages A, B and C have words of their own for the same meanings. Documents are running text of A or B, a chain in
which every meaning has four likely successors, the same for both; or a list of words with their translations. Only
the running text prefers a language: where word lists did too, translations into the rare one were not learned in as
many steps. The design and its sizes are ours, with steps enough to translate from C to B; the paper trains no model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from ...descent import descend

LANGUAGES = ("A", "B", "C")
MEANINGS, SMALL = 64, 32  # of A and B; of C
OFFSETS = (0, MEANINGS, 2 * MEANINGS)
TAGS = 2 * MEANINGS + SMALL  # the token that names A, then B's and C's
VOCABULARY = TAGS + len(LANGUAGES)
LENGTH, BATCH, STEPS, RATE = 32, 32, 600, 3e-3
SUCCESSORS = (0.4, 0.3, 0.2, 0.1)


def bilingual(share: float, seed: int, steps: int = STEPS) -> Any:
    """A Llama of six blocks and width 64, without tied embeddings, trained on these documents.

    share: of A in the running text; the rest is B. Word lists have no preference.
    """
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=192, num_hidden_layers=6, num_attention_heads=4,
        max_position_embeddings=LENGTH, initializer_range=0.05, tie_word_embeddings=False, pad_token_id=None,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        ids = documents(share, BATCH, generator)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    descend(model, loss, steps, RATE)
    return model


def documents(share: float, count: int, generator: torch.Generator) -> Tensor:
    """Half running text, of A by its share and else of B, and half word lists (count x LENGTH).

    A word list goes from any of the languages to any, the same one included (repetition), all equally often.
    """
    languages = (torch.rand(count, generator=generator) >= share).long()
    sources, targets = torch.randint(len(LANGUAGES), (2, count), generator=generator)
    few = ((sources == 2) | (targets == 2))[:, None] & (torch.arange(MEANINGS) >= SMALL)
    meanings = torch.multinomial((~few).float(), LENGTH // 4, generator=generator)
    lists = word_lists(meanings, sources, targets)
    return torch.where(torch.arange(count)[:, None] % 2 == 0, texts(languages, generator), lists)


def texts(languages: Tensor, generator: torch.Generator) -> Tensor:
    """Running text in these languages (n x LENGTH): the language's token, and words of the chain."""
    grammar = [torch.Generator().manual_seed(number) for number in range(len(SUCCESSORS))]
    table = torch.stack([torch.randperm(MEANINGS, generator=one) for one in grammar])
    choices = torch.multinomial(torch.tensor(SUCCESSORS), len(languages) * LENGTH, True, generator=generator)
    meanings = [torch.randint(MEANINGS, languages.shape, generator=generator)]
    for chosen in choices.view(LENGTH, -1)[2:]:
        meanings.append(table[chosen, meanings[-1]])
    return torch.cat([TAGS + languages[:, None], torch.stack(meanings, 1) + offset(languages)], 1)


def word_lists(meanings: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
    """Words and their translations (n x 4 m) of meanings (n x m): source's token, word, target's token, word ..."""
    tags = [(TAGS + languages)[:, None].expand_as(meanings) for languages in (sources, targets)]
    rows = torch.stack([tags[0], meanings + offset(sources), tags[1], meanings + offset(targets)], 2)
    return rows.flatten(1)


def offset(languages: Tensor) -> Tensor:
    """The first word's id of each language (n x 1)."""
    return torch.tensor(OFFSETS)[languages][:, None]


def questions(source: str, target: str, shots: int = 4, times: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Every meaning of C, asked for after some other translated words: prompts (n x T) and meanings (n).

    A prompt ends with the token of the target language.
    """
    meanings = torch.arange(SMALL).repeat(times)
    others = torch.ones(len(meanings), SMALL).scatter(1, meanings[:, None], 0)
    before = torch.multinomial(others, shots, generator=torch.Generator().manual_seed(seed))
    sources, targets = (torch.full_like(meanings, LANGUAGES.index(name)) for name in (source, target))
    return word_lists(torch.cat([before, meanings[:, None]], 1), sources, targets)[:, :-1], meanings
