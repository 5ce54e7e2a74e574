"""Editing a model: check, measure, change, measure again; all or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..anatomy import Anatomy
from ..checkpoint import check_output, open_model, save
from ..compression.fingerprint import model_fingerprint
from ..data import Batches, Specimen
from ..errors import BadCheckpoint
from ..evaluation import evaluate_loss
from ..forward import at_rest
from ..store import alone
from .card import Card
from .journal import Journal
from .registry import Edit, edit
from .stack import Entry, attach, checked_name, entry_named, read_stack, stack_of, take_out, write_stack


@dataclass
class Edited:
    """A model after an edit, with the card and the way back. Saving the model alone loses the way back: use `save`.

    entry: the edit's place in the model's stack of edits.
    """

    model: Any
    card: Card
    journal: Journal
    entry: Entry

    def undo(self) -> Any:
        """Take the edit back, bit for bit; returns the model.

        If others were made since, it is taken out from under them; TransectError where they depend on it.
        """
        stack = stack_of(self.model, model_fingerprint(self.model))
        if any(entry.name == self.entry.name for entry in stack) and stack[-1] is not self.entry:
            attach(self.model, take_out(Anatomy(self.model), stack, self.entry.name, with_dependents=False))
            return self.model
        self.journal.undo()
        attach(self.model, [entry for entry in stack if entry.name != self.entry.name])
        return self.model

    def save(self, folder: str | Path, tokenizer: Any = None, *, overwrite: bool = False) -> Path:
        """Write an ordinary checkpoint with all edits that are in the model beside it: all, or nothing.

        If the weights were changed by something else since, there is no way back, and a note says so.
        """
        stack = stack_of(self.model, model_fingerprint(self.model))
        return save(
            self.model, folder, tokenizer, overwrite=overwrite, beside=lambda inside: write_stack(inside, stack)
        )


def edit_specimen(
    specimen: Specimen, name: str, settings: Mapping[str, Any], evaluation: Batches | None = None, called: str = ""
) -> Edited:
    """Edit a model in place. After any error or interruption its weights are bit for bit what they were.

    evaluation: text for the general loss on the card. Default: the specimen's own text, if it has any. called: the
    edit's name in the model's stack. Default: the method's with a number.
    Raises TransectError before any change for an unknown edit or setting, or what cannot be done.
    """
    chosen = edit(name)
    complete = chosen.settings(settings)
    model = specimen.model
    before_it = model_fingerprint(model)
    stack = stack_of(model, before_it)
    called = checked_name(called, stack, name)
    if chosen.check is not None:
        chosen.check(specimen, **complete)
    journal = Journal(model)
    with at_rest(model, frozen=True):
        try:
            before = _measured(specimen, chosen.measure, evaluation)
            reads = None if chosen.reads is None else sorted(chosen.reads(specimen, **complete))
            notes = chosen.function(specimen, journal, **complete) or {}
            specimen.anatomy.check_finite()
            after = _measured(specimen, chosen.measure, evaluation)
            measured = [(key, before[key], after.get(key, float("nan"))) for key in before]
            card = Card(name, complete, measured, journal.changes(), dict(notes))
            patch = journal.patch()
        except BaseException:
            journal.undo()
            raise
    journal.note(name, complete, called)
    entry = Entry(
        called, datetime.now(UTC).isoformat(timespec="seconds"), _facts(specimen, chosen), card, before_it,
        model_fingerprint(model), reads if patch.can_be_repeated else None, journal.changed(), patch,
    )  # fmt: skip
    attach(model, [*stack, entry])
    return Edited(model, card, journal, entry)


def _facts(specimen: Specimen, chosen: Edit) -> list[str]:
    facts = specimen.known_facts if chosen.of_facts else ()
    return [f"{fact.text} {fact.new_answer or fact.answer}" for fact in facts]


def _measured(specimen: Specimen, measure: Any, evaluation: Batches | None) -> dict[str, float]:
    numbers = dict(measure(specimen))
    text = specimen.data if evaluation is None else evaluation
    if text is not None:
        where = "held-out text" if evaluation is not None else "the text that the edit was given"
        numbers[f"loss on {where}, nats"] = evaluate_loss(specimen.model, text).loss
    return numbers


def undo_folder(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    name: str = "",
    dependents: bool = False,
    overwrite: bool = False,
) -> Path:
    """Take an edit that a checkpoint folder holds out again: the newest bit for bit, any as if it had never been made.

    out: where to write the model without it. Default: in place of the one that is there. name: of the edit, see
    `read_stack`. Default: the newest. dependents: take out the later edits that depend on it too, see `take_out`.
    Raises TransectError where others depend on it, and BadCheckpoint where the folder holds no edit, its weights are
    not bit for bit those that the edits left, or a patch is not what its edit wrote; then nothing has changed.
    """
    source = Path(folder).expanduser()
    stack = read_stack(source)
    chosen = entry_named(stack, name)
    target = source if out is None else check_output(out, overwrite)
    with alone(target):
        opened = open_model(source)
        if model_fingerprint(opened.model) != stack[-1].after:
            raise BadCheckpoint(
                f"the weights in {source} were changed since they were edited, so no edit can be taken back bit for bit"
            )
        try:
            left = take_out(Anatomy(opened.model), stack, chosen.name, dependents)
        except BadCheckpoint as error:
            raise BadCheckpoint(f"{source}: {error}") from None
        attach(opened.model, left)
        return save(
            opened.model, target, opened.tokenizer or opened.processor, overwrite=out is None or overwrite,
            beside=lambda inside: write_stack(inside, left),
        )  # fmt: skip
