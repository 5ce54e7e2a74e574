"""Editing a model: check, measure, change, measure again; all or nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from ..anatomy import record_of
from ..checkpoint import check_output, open_model, save
from ..compression.fingerprint import model_fingerprint
from ..data import Batches, Specimen
from ..errors import BadCheckpoint
from ..evaluation import evaluate_loss
from ..forward import at_rest
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
        undo = {"config": self.journal.config, "added": self.journal.added, "model": model_fingerprint(self.model)}
        described = {**json.loads(self.card.to_json()), "undo": undo}

        def write(folder: Path) -> None:
            save_file(self.journal.before, folder / UNDO)
            (folder / "edit.md").write_text(self.card.markdown(), encoding="utf-8")
            (folder / CARD).write_text(json.dumps(described, indent=1), encoding="utf-8")

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
    Raises BadCheckpoint where the folder holds no edit, or its weights are not bit for bit those that the edit left.
    """
    source = Path(folder).expanduser()
    try:
        described = json.loads((source / CARD).read_text(encoding="utf-8"))
        before = load_file(source / UNDO)
        undo = described["undo"]
    except (OSError, ValueError, KeyError) as error:
        raise BadCheckpoint(f"{source} holds no edit that could be taken back ({CARD} and {UNDO}): {error}") from None
    except Exception as error:
        raise BadCheckpoint(f"{source / UNDO} is damaged: {error}") from error
    target = source if out is None else check_output(out, overwrite)
    opened = open_model(source)
    if model_fingerprint(opened.model) != undo["model"]:
        raise BadCheckpoint(
            f"the weights in {source} were changed since they were edited, so the edit cannot be taken back bit for "
            f"bit; what they were before it is in {UNDO}"
        )
    restore(opened.model, before, undo["config"], undo["added"])
    history = record_of(opened.model).history
    if history and "edit" in history[-1]:
        history.pop()
    return save(opened.model, target, opened.tokenizer or opened.processor, overwrite=out is None or overwrite)
