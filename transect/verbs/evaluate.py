"""`transect.evaluate`: loss, knowledge, speed, size and memory of one model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import evaluation as evaluation_room
from ..anatomy import Anatomy
from ..arguments import checked
from ..data import SpecialTokens, Specimen, load_facts, load_passages
from ..errors import NotApplicable, TransectError
from ..parameters import Seed, listed
from .arguments import Count, Length
from .common import held_out_of, opened_of


@checked
def evaluate(
    model: Any,
    data: Any,
    *,
    facts: Any = None,
    passages: Any = None,
    behind: Sequence[Count] = (),
    tokenizer: Any = None,
    sequence_length: Length | None = None,
    special_tokens: SpecialTokens = "auto",
    sequences: Count | None = None,
    batch_size: Count = 8,
    seed: Seed = 0,
) -> dict[str, Any]:
    """Loss, perplexity and accuracy of a model on held-out data, its speed, and its size; see `evaluation.evaluate`.

    model: a Hugging Face model or the name of one. data, and what comes after the tokenizer: see `transect.data.load`.
    facts, passages: see `transect.data.load_facts` and `load_passages`; `common` are ours. Of each the result has how
        many were asked and how many the model goes on with by itself: facts_asked, facts_known, passages_asked,
        passages_known (see `transect.evaluation.says`).
    behind: how much of the data, in tokens, stands between a note that says each fact otherwise and the question; the
        result has how many of the facts it says as the note does, as facts_recalled_N (see
        `transect.evaluation.recalls`).
    """
    questions = {} if facts is None else {"facts": load_facts(facts)}
    questions |= {} if passages is None else {"passages": load_passages(passages)}
    if behind and "facts" not in questions:
        raise TransectError("behind= asks for facts from notes: pass facts= too")
    opened = opened_of(model, tokenizer)
    held_out = held_out_of(data, opened, sequence_length, sequences, batch_size, seed, special_tokens)
    result: dict[str, Any] = evaluation_room.evaluate(opened.model, held_out)
    for name, asked in questions.items():
        try:
            known = sum(evaluation_room.says(Specimen(Anatomy(opened.model), opened.tokenizer), asked))
        except NotApplicable as reason:
            raise TransectError(f"{name} cannot be asked: {reason}") from None
        result |= {f"{name}_known": known, f"{name}_asked": len(asked)}
    if behind:
        text = torch.cat([batch["input_ids"].flatten() for batch in held_out])
        specimen = Specimen(Anatomy(opened.model), opened.tokenizer)
        for distance in listed(behind):
            found = evaluation_room.recalls(specimen, questions["facts"], text, distance, batch_size)  # type: ignore
            result[f"facts_recalled_{distance}"] = sum(found)
    return result
