"""What several verbs share: opening the model, reading the data, naming the recipe."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import Pipeline

from ..anatomy import Anatomy, model_in
from ..checkpoint import Opened, open_model, tokenizer_of
from ..compression import Recipe, allocation_named
from ..compression import method as registered
from ..data import LONGEST, Batches, SpecialTokens, Specimen, load, load_choices, load_facts, load_passages
from ..errors import TransectError
from ..statistics import Progress

CALIBRATION_SEQUENCES = 256
OF_ALLOCATION = "allocation_"
Settings = Mapping[str, Mapping[str, Any]]  # method, allocation, probe or edit -> its parameters


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
    method: str,
    keep: float,
    allocation: str | None,
    sequential: bool,
    refit: bool,
    settings: Settings | None,
    parameters: Mapping[str, Any],
) -> Recipe:
    """The recipe of these arguments. parameters: of the method, and with a prefix of the allocation; see `one_of`."""
    of_allocation = {k.removeprefix(OF_ALLOCATION): v for k, v in parameters.items() if k.startswith(OF_ALLOCATION)}
    of_method = {key: value for key, value in parameters.items() if not key.startswith(OF_ALLOCATION)}
    recipe = Recipe(method, float(keep), allocation or "", sequential=sequential, refit=refit)
    chosen = one_of(settings, {recipe.method: of_method, recipe.allocation: of_allocation})
    return replace(recipe, settings=chosen[recipe.method], allocation_settings=chosen[recipe.allocation])


def one_of(settings: Settings | None, parameters: Settings) -> dict[str, dict[str, Any]]:
    """What was chosen of each of the entries that are used, whichever way it was given.

    settings: by the entry's name, as `compare` and `inspect` take them; there no parameter meets an argument of the
    verb. parameters: for each entry that is used, those that came as arguments of their own. TransectError for
    settings of something else, and for a parameter that was given twice.
    """
    given = {name: dict(values) for name, values in (settings or {}).items()}
    unused = [name for name in given if name not in parameters]
    if unused:
        raise TransectError(
            f"there are settings for {', '.join(unused)}, but only {', '.join(parameters)} can have any here"
        )
    for name, values in parameters.items():
        twice = sorted(given.get(name, {}).keys() & values.keys())
        if twice:
            raise TransectError(f"{name}: {', '.join(twice)} was given twice, in settings and beside them")
    return {name: {**given.get(name, {}), **values} for name, values in parameters.items()}


def given_of(settings: Settings | None, methods: Sequence[str], allocations: Sequence[str]) -> dict[str, Any]:
    """The settings of a comparison as they were given, each accepted by the method or allocation that it is for."""
    entries = [registered(name) for name in methods]
    entries += [allocation_named(name) for name in allocations or dict.fromkeys(one.allocation for one in entries)]
    chosen = one_of(settings, {entry.name: {} for entry in entries})
    return {
        entry.name: {name: entry.settings(chosen[entry.name])[name] for name in chosen[entry.name]}
        for entry in entries
        if entry.name in (settings or {})
    }


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
    longest: int = LONGEST,
) -> Batches:
    """Held-out data as batches: nothing of it is lost."""
    return load(
        data, opened.model, opened.tokenizer, opened.processor,
        sequence_length=length, sequences=sequences, batch_size=batch_size, seed=seed,
        special_tokens=special_tokens, longest=longest,
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
    longest: int = LONGEST,
) -> Specimen:
    """The model on the table. bundled: use the bundled model's own text and questions as defaults; by default where the
    model is named `organism`. with_facts: its facts too. longest: tokens of a sequence where `length` is not given."""
    if bundled is None:
        bundled = model == "organism" or (isinstance(model, Opened) and model.source == "organism")
    opened = opened_of(model, tokenizer)
    if bundled:
        data, choices = data or "organism:calibration", choices or "organism:choices"
        passages, facts = passages or "organism:passages", facts or ("organism:facts" if with_facts else None)
    batches = None
    if data is not None:
        batches = held_out_of(data, opened, length, sequences, batch_size, seed, special_tokens, longest)
    return Specimen(
        Anatomy(opened.model), opened.tokenizer, batches,
        () if facts is None else load_facts(facts),
        () if choices is None else load_choices(choices),
        () if passages is None else load_passages(passages),
        seed, opened.source, progress,
    )  # fmt: skip


def fingerprint_of(tokenizer: Any, *questions: Sequence[Any]) -> str:
    """Hash (32 hexadecimal digits) of facts, choices or passages and of the tokenizer that they are asked through."""
    digest = hashlib.blake2b(_of_tokenizer(tokenizer).encode(), digest_size=16)
    for asked in questions:
        digest.update(repr([asdict(one) for one in asked]).encode())
    return digest.hexdigest()


def _of_tokenizer(tokenizer: Any) -> str:
    """What decides the tokens that it makes of a question; nothing where there is none."""
    if not hasattr(tokenizer, "get_vocab"):
        return ""
    described = {"class": type(tokenizer).__name__, "special": tokenizer.special_tokens_map}
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        described["vocabulary"] = tokenizer.get_vocab()
    else:
        chosen_by_a_call = ("truncation", "padding")
        described |= {k: v for k, v in json.loads(fast.to_str()).items() if k not in chosen_by_a_call}
    return json.dumps(described, sort_keys=True, default=str)
