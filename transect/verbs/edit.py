"""`transect.edit`: rewrite, remove or neutralise something in a model's weights, and see what else changed."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..arguments import checked
from ..checkpoint import check_output
from ..data import SpecialTokens
from ..editing import Edited, edit_specimen
from ..editing import edit as edit_named
from ..parameters import Seed
from ..statistics import Progress
from ..store import alone
from .arguments import Count, FolderName, Length
from .common import CALIBRATION_SEQUENCES, Settings, held_out_of, one_of, opened_of, specimen_of


@checked
def edit(
    model: Any,
    method: str,
    *,
    name: str = "",
    facts: Any = None,
    choices: Any = None,
    passages: Any = None,
    data: Any = None,
    eval_data: Any = None,
    out: FolderName | None = None,
    tokenizer: Any = None,
    sequence_length: Length | None = None,
    special_tokens: SpecialTokens = "auto",
    sequences: Count | None = CALIBRATION_SEQUENCES,
    eval_sequences: Count | None = 64,
    batch_size: Count = 8,
    seed: Seed = 0,
    overwrite: bool = False,
    settings: Settings | None = None,
    progress: Progress | None = None,
    **parameters: Any,
) -> Edited:
    """Edit a model in place. `result.card` shows before and after, `result.undo()` takes it back bit for bit.

    model: a Hugging Face model, or the name of one. method: see `transect.edits()`. name: what to call the edit in the
        model's stack of edits, by which it can be taken out again. Default: the method's with a number.
    facts: what to rewrite, see `transect.data.load_facts`; choices, passages: what the edit or its card asks.
    data: text for statistics. eval_data: held-out text for the general loss on the card. The bundled model, called by
        its name, has its own as defaults, except for the facts to rewrite.
    out: a folder for the result, an ordinary checkpoint, with all edits that are in the model beside it.
    sequence_length, sequences, batch_size, special_tokens: of the text, see `transect.data.load`.
    parameters: the edit's. settings: the same by the edit's name, as {"rome": {"layer": 3}}, for a parameter that is
        called as an argument of this function is.

    Raises TransectError before any change if something cannot be done; after any error the weights are bit for bit as
    they were.
    """
    chosen = edit_named(method).settings(one_of(settings, {method: parameters})[method])
    if out is not None:
        check_output(out, overwrite)
    opened = opened_of(model, tokenizer)
    bundled = opened.source == "organism"
    specimen = specimen_of(
        opened, data, facts=facts, choices=choices, passages=passages, length=sequence_length,
        sequences=sequences, batch_size=batch_size, seed=seed, special_tokens=special_tokens,
        progress=progress, bundled=bundled, with_facts=False,
    )  # fmt: skip
    if eval_data is None and bundled:
        eval_data = "organism:heldout"
    evaluation = (
        None if eval_data is None
        else held_out_of(eval_data, opened, sequence_length, eval_sequences, batch_size, seed, special_tokens)
    )  # fmt: skip
    with nullcontext() if out is None else alone(Path(out)):
        edited = edit_specimen(specimen, method, chosen, evaluation, name)
        if out is not None:
            edited.save(out, opened.tokenizer or opened.processor, overwrite=overwrite)
    return edited
