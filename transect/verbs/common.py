"""What several verbs share: opening the model, reading the data, naming the recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import Pipeline

from ..anatomy import Anatomy, model_in
from ..checkpoint import Opened, open_model, tokenizer_of
from ..compression import Recipe
from ..data import Batches, SpecialTokens, Specimen, load, load_choices, load_facts, load_passages
from ..statistics import Progress

CALIBRATION_SEQUENCES = 256
OF_ALLOCATION = "allocation_"


def opened_of(model: Any, tokenizer: Any) -> Opened:
    """The model, opened if only its name is given, with the tokenizer that was passed or lies beside it.

    A pipeline stands for its model and tokenizer. Raises TransectError for what is no model that can be opened up.
    """
    if isinstance(model, (str, Path)):
        model = open_model(model)
    if not isinstance(model, Opened):
        inside = model_in(model)
        beside = (model.tokenizer or model.image_processor) if isinstance(model, Pipeline) else None
        found = tokenizer_of(inside) if beside is None else beside
        model = Opened(inside, found, found, "", None)
    return model if tokenizer is None else replace(model, tokenizer=tokenizer, processor=tokenizer)


def recipe_of(
    method: str, keep: float, allocation: str | None, sequential: bool, refit: bool, settings: Mapping[str, Any]
) -> Recipe:
    """The recipe of these arguments; settings of the allocation begin with its prefix."""
    of_allocation = {k.removeprefix(OF_ALLOCATION): v for k, v in settings.items() if k.startswith(OF_ALLOCATION)}
    of_method = {key: value for key, value in settings.items() if not key.startswith(OF_ALLOCATION)}
    return Recipe(method, float(keep), allocation or "", of_method, of_allocation, sequential, refit)


def calibration_of(
    data: Any,
    opened: Opened,
    length: int | None,
    sequences: int | None,
    batch_size: int,
    seed: int,
    special_tokens: SpecialTokens,
) -> Batches:
    """Calibration data as batches: full sequences only."""
    return load(
        data, opened.model, opened.tokenizer, opened.processor,
        sequence_length=length, sequences=sequences, batch_size=batch_size, full_only=True, seed=seed,
        special_tokens=special_tokens,
    )  # fmt: skip


def held_out_of(
    data: Any,
    opened: Opened,
    length: int | None,
    sequences: int | None,
    batch_size: int,
    seed: int,
    special_tokens: SpecialTokens,
) -> Batches:
    """Held-out data as batches: nothing of it is lost."""
    return load(
        data, opened.model, opened.tokenizer, opened.processor,
        sequence_length=length, sequences=sequences, batch_size=batch_size, seed=seed,
        special_tokens=special_tokens,
    )  # fmt: skip


def specimen_of(
    model: Any,
    data: Any,
    *,
    facts: Any = None,
    choices: Any = None,
    passages: Any = None,
    tokenizer: Any = None,
    length: int | None = None,
    sequences: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    special_tokens: SpecialTokens = "auto",
    progress: Progress | None = None,
    bundled: bool | None = None,
    with_facts: bool = True,
) -> Specimen:
    """The model on the table. bundled: use the bundled model's own text and questions as defaults; by default where the
    model is named `organism`. with_facts: its facts too."""
    if bundled is None:
        bundled = model == "organism" or (isinstance(model, Opened) and model.source == "organism")
    opened = opened_of(model, tokenizer)
    if bundled:
        data, choices = data or "organism:calibration", choices or "organism:choices"
        passages, facts = passages or "organism:passages", facts or ("organism:facts" if with_facts else None)
    batches = None
    if data is not None:
        batches = held_out_of(data, opened, length, sequences, batch_size, seed, special_tokens)
    return Specimen(
        Anatomy(opened.model), opened.tokenizer, batches,
        () if facts is None else load_facts(facts),
        () if choices is None else load_choices(choices),
        () if passages is None else load_passages(passages),
        seed, opened.source, progress,
    )  # fmt: skip
