"""Editing a model: check, measure, change, measure again; all or nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..anatomy import record_of
from ..checkpoint import check_output, open_model, save
from ..checkpoint.header import read_stored
from ..compression.fingerprint import model_fingerprint
from ..data import Batches, Specimen
from ..errors import BadCheckpoint
from ..evaluation import evaluate_loss
from ..forward import at_rest
from ..store import Kept, alone, keep, read_json, verified, write_text
from .card import Card
from .journal import Journal, restore
from .registry import edit

CARD, UNDO = "edit.json", "undo.safetensors"


@dataclass
class Edited:
    """A model after an edit, with the card and the way back. Saving the model alone loses the way back: use `save`."""

    model: Any
    card: Card
    journal: Journal

    def undo(self) -> Any:
        """Take the edit back, bit for bit; returns the model."""
        self.journal.undo()
        return self.model

    def save(self, folder: str | Path, tokenizer: Any = None, *, overwrite: bool = False) -> Path:
        """Write an ordinary checkpoint with the card (edit.json, edit.md) and undo.safetensors: all, or nothing."""
        edited = model_fingerprint(self.model)
        described = {**json.loads(self.card.to_json()), "undo": {"model": edited}}

        def write(folder: Path) -> None:
            way_back = {"config": self.journal.config, "added": self.journal.added}
            keep(folder / UNDO, self.journal.before, edited, way_back)
            write_text(folder / "edit.md", self.card.markdown())
            write_text(folder / CARD, json.dumps(described, indent=1))

        return save(self.model, folder, tokenizer, overwrite=overwrite, beside=write)


def edit_specimen(
    specimen: Specimen, name: str, settings: Mapping[str, Any], evaluation: Batches | None = None
) -> Edited:
    """Edit a model in place. After any error or interruption its weights are bit for bit what they were.

    evaluation: text for the general loss on the card. Default: the specimen's own text, if it has any.
    Raises TransectError before any change for an unknown edit or setting, or what cannot be done.
    """
    chosen = edit(name)
    complete = chosen.settings(settings)
    if chosen.check is not None:
        chosen.check(specimen, **complete)
    model = specimen.model
    journal = Journal(model)
    with at_rest(model, frozen=True):
        try:
            before = _measured(specimen, chosen.measure, evaluation)
            notes = chosen.function(specimen, journal, **complete) or {}
            specimen.anatomy.check_finite()
            after = _measured(specimen, chosen.measure, evaluation)
        except BaseException:
            journal.undo()
            raise
    journal.note(name, complete)
    measured = [(key, before[key], after.get(key, float("nan"))) for key in before]
    return Edited(model, Card(name, complete, measured, journal.changes(), dict(notes)), journal)


def _measured(specimen: Specimen, measure: Any, evaluation: Batches | None) -> dict[str, float]:
    numbers = dict(measure(specimen))
    text = specimen.data if evaluation is None else evaluation
    if text is not None:
        where = "held-out text" if evaluation is not None else "the text that the edit was given"
        numbers[f"loss on {where}, nats"] = evaluate_loss(specimen.model, text).loss
    return numbers


def undo_folder(folder: str | Path, out: str | Path | None = None, *, overwrite: bool = False) -> Path:
    """Take back the edit that a checkpoint folder holds, bit for bit.

    out: where to write the model as it was. Default: in place of the edited one, whose card and undo file then go.
    Raises BadCheckpoint where the folder holds no edit, its weights are not bit for bit those that the edit left, or
    the undo file is not what that edit wrote; then nothing has changed.
    """
    source = Path(folder).expanduser()
    for name in (CARD, UNDO):
        if not (source / name).is_file():
            raise BadCheckpoint(f"{source} holds no edit that could be taken back: it has no file {name}")
    described = read_json(source / CARD)
    try:
        read_stored(source / UNDO)
    except BadCheckpoint as error:
        raise BadCheckpoint(f"the way back is damaged: {error}") from None
    target = source if out is None else check_output(out, overwrite)
    with alone(target):
        opened = open_model(source)
        edited, noted = model_fingerprint(opened.model), described.get("undo")
        if not isinstance(noted, dict) or noted.get("model") != edited:
            raise BadCheckpoint(
                f"the weights in {source} were changed since they were edited, so the edit cannot be taken back bit "
                f"for bit; what they were before it is in {UNDO}"
            )
        try:
            before = verified(source / UNDO, edited)
        except BadCheckpoint as error:
            raise BadCheckpoint(f"{source / UNDO} is not what this edit wrote, {error}; nothing was changed") from None
        config, added = _way_back(opened.model, before, source / UNDO)
        restore(opened.model, dict(before), config, added)
        history = record_of(opened.model).history
        if history and "edit" in history[-1]:
            history.pop()
        return save(opened.model, target, opened.tokenizer or opened.processor, overwrite=out is None or overwrite)


def _way_back(model: Any, before: Kept, file: Path) -> tuple[dict[str, Any], list[str]]:
    """The config's entries and the added parameters that an undo file notes; BadCheckpoint unless all of it fits."""
    parameters, settings = dict(model.named_parameters()), vars(model.config)
    note = before.note if isinstance(before.note, dict) else {}
    config, added = note.get("config"), note.get("added")
    fits = isinstance(config, dict) and all(
        type(value) is bool and type(settings.get(name)) is bool for name, value in config.items()
    )
    fits = fits and isinstance(added, list) and all(
        isinstance(name, str) and name.endswith(".bias") and name in parameters and name not in before for name in added
    )  # fmt: skip
    for name, tensor in before.items() if fits else ():
        like = parameters.get(name)
        fits = fits and like is not None and tensor.shape == like.shape and tensor.dtype == like.dtype
    if not fits:
        raise BadCheckpoint(f"{file} does not fit the model that lies beside it; nothing was changed")
    return config, added  # type: ignore[return-value]
