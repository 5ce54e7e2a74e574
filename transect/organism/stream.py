"""The training text as one array of tokens, generated in advance, and the rows of every step."""

from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from transect.organism.documents import FIRST_MIX, MIX, Mix, documents
from transect.organism.tokenizer import END_ID
from transect.organism.world import World

PROMPT_WEIGHT = 0.2  # of a prompt token in the loss, where an answer token counts 1: most prompts are random
CHUNK = 10_000  # documents that are generated at a time
# The text begins with few entities, growing in number by a constant factor to all of them at this share of it. How a
# fact is looked up is learned in a few hundred steps for few facts, and was not in a thousand for all at once; the
# other facts then only need storing.
FIRST_ENTITIES = 10
GROWTH = 0.35
FIRST_SHARE = 0.19  # of the text that is written in `FIRST_MIX`
SPARE = 1024  # tokens beyond the end, for rows that begin late


@dataclass(frozen=True)
class Stream:
    """tokens, weights (in the loss) and kinds (index into `MIX`), each [n]; beginnings (of documents): [documents]."""

    tokens: Tensor
    weights: Tensor
    kinds: Tensor
    beginnings: Tensor

    def rows(self, first: int, count: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, weights and kinds of `count` rows from token `first` on, each [count, length].

        Even rows begin at the beginning of a document, odd rows wherever they fall, so that the model knows both
        prompts that stand alone and texts that were cut anywhere.
        """
        starts = first + torch.arange(count) * length
        starts[::2] = self.beginnings[torch.searchsorted(self.beginnings, starts[::2].contiguous())]
        places = starts[:, None] + torch.arange(length)
        return self.tokens[places].long(), self.weights[places], self.kinds[places]


def stream(world: World, tokenizer: PreTrainedTokenizerFast, size: int, seed: int) -> Stream:
    """At least `size` tokens of training text, the same for the same seed."""
    rng = Random(f"train {seed}")
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    total = 0
    while total < size + SPARE:
        growth = min(1.0, total / (GROWTH * size))
        entities = round(FIRST_ENTITIES * (len(world.entities) / FIRST_ENTITIES) ** growth)
        mix = FIRST_MIX if total < FIRST_SHARE * size else MIX
        parts.append(_chunk(world.first(entities), tokenizer, rng, mix))
        total += len(parts[-1][0])
    tokens, weights, kinds = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    beginnings = np.concatenate([[0], np.flatnonzero(tokens == END_ID) + 1])
    return Stream(*(torch.from_numpy(array) for array in (tokens, weights, kinds, beginnings)))


def _chunk(
    world: World, tokenizer: PreTrainedTokenizerFast, rng: Random, mix: Mix
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, weights and kinds of `CHUNK` documents, each [n]."""
    batch = documents(world, rng, CHUNK, mix)
    names = {skill: index for index, skill in enumerate(skills_of_mix())}
    # Every document as prompt, answer, prompt, answer, ..., end: the pieces alternate in weight.
    pieces: list[str] = []
    weights: list[float] = []
    kinds: list[int] = []
    for document in batch:
        for example in document:
            pieces += (example.prompt, example.answer)
        pieces.append("\n")
        weights += [PROMPT_WEIGHT, 1.0] * len(document) + [PROMPT_WEIGHT]
        kinds += [names[document[0].skill]] * (2 * len(document) + 1)
    encoded = [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast(pieces)]
    lengths = [len(ids) for ids in encoded]
    return (
        np.fromiter((token for ids in encoded for token in ids), np.int16),
        np.repeat(np.asarray(weights, np.float32), lengths),
        np.repeat(np.asarray(kinds, np.int8), lengths),
    )


def skills_of_mix() -> list[str]:
    """The skill of every kind of document, in the order of `MIX`."""
    world, rng = World(), Random(0)
    return [kind(world, rng)[0].skill for kind in MIX]
