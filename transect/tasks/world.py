"""The bundled model's world: its text, and which of its facts a model can tell."""

from __future__ import annotations

from functools import cache
from random import Random
from typing import Annotated, Any

import torch

from ..forward import at_rest
from ..organism import Example, World
from ..organism.documents import documents
from ..organism.tasks import hits
from ..organism.world import HELD_BACK, N_ENTITIES
from ..parameters import Range
from .registry import Drawn, task
from .text import tokenizer_of

_ASKED = 200  # facts, at most
_AT_ONCE = 256  # documents that are written before it is asked whether they fill the rows
_whole = cache(World)


def _facts(model: Any, *, entities: int, length: int) -> dict[str, float]:
    """The share of the facts, in wordings that are trained, which a model goes on with word for word."""
    known = _whole().first(entities).facts
    asked = [Example(fact.prompt(wording), fact.answer(), "facts") for fact in known for wording in range(HELD_BACK)]
    Random("facts").shuffle(asked)
    with at_rest(model):
        right = hits(model, tokenizer_of("organism"), asked[:_ASKED], batch_size=64)
    return {"facts": sum(right) / len(right)}


@task("world", paper="Transect's own", asks=_facts)
def world(
    count: int, generator: torch.Generator, *, entities: Annotated[int, Range(2, N_ENTITIES)] = 20,
    length: Annotated[int, Range(32, 2**20)] = 64,
) -> Drawn:  # fmt: skip
    """Text of an invented world: facts in two languages, sums, notes, lists, choices, passages.

    Every row begins with a document, and each token is to be told from those before it. The facts are the same in the
    text that is held out, what is drawn at random is not. Beside the loss, the share of the facts is counted that the
    model goes on with word for word.

    entities: how many of the world's 200 are spoken of; four facts each.
    length: of a row.
    """
    tokenizer, part = tokenizer_of("organism"), _whole().first(entities)
    rng = Random(f"world {generator.initial_seed()}")
    rows: list[list[int]] = []
    row: list[int] = []
    while len(rows) < count:
        written = documents(part, rng, _AT_ONCE)
        lines = [" ".join(example.text for example in document) + "\n" for document in written]
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(lines, add_special_tokens=False):
            row = [*row, *encoding.ids]
            if len(row) >= length:
                rows.append(row[:length])
                row = []
    answers = torch.ones(count, length, dtype=torch.bool)
    answers[:, 0] = False
    return Drawn(torch.tensor(rows[:count]), answers, len(tokenizer))
