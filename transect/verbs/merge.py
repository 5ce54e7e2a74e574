"""`transect.merge`: several trained models of one shape into one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from ..anatomy import Anatomy
from ..arguments import Range, checked
from ..checkpoint import check_output, save
from ..data import SpecialTokens
from ..errors import TransectError
from ..merging import merge_models, merging_named
from ..merging.merge import Files
from ..parameters import Seed
from ..report.merging import barrier_plot
from ..statistics import Progress
from ..store import alone, write_text
from .arguments import Count, FolderName, Length
from .common import Settings, held_out_of, one_of, opened_of

OUTCOME, PLOT = "merge.json", "curve.png"


@dataclass(frozen=True)
class Merged:
    """model: the new model. outcome: see `transect.merging.merge_models`. files: what else belongs into its folder."""

    model: Any
    outcome: dict[str, Any]
    files: Files

    def save(self, folder: str | Path, tokenizer: Any = None, *, overwrite: bool = False) -> Path:
        """Write an ordinary checkpoint with merge.json, the curve's plot and the method's own files: all, or none."""

        def write(place: Path) -> None:
            for one in self.files.values():
                one(place)
            if "curves" in self.outcome:
                barrier_plot(self.outcome, place / PLOT)
            write_text(place / OUTCOME, json.dumps(self.outcome, indent=1))

        return save(self.model, folder, tokenizer, overwrite=overwrite, beside=write)


@checked
def merge(
    models: Sequence[Any],
    method: str,
    *,
    base: Any = None,
    curve: Any = None,
    points: Annotated[int, Range(3, 1001)] = 11,
    out: FolderName | None = None,
    tokenizer: Any = None,
    sequence_length: Length | None = None,
    special_tokens: SpecialTokens = "auto",
    sequences: Count | None = None,
    batch_size: Count = 8,
    seed: Seed = 0,
    overwrite: bool = False,
    settings: Settings | None = None,
    progress: Progress | None = None,
    **parameters: Any,
) -> Merged:
    """Merge two or more trained models of one shape into a new one; the given ones stay as they are.

    models: Hugging Face models, or the names of some. method: see `transect.mergings()`.
    base: the model that they were trained from, for the methods that need it.
    curve: held-out text. On it the models and the result are measured, and the straight line between the first two at
        `points` shares, for weight matching also with the second in its new order; `sequences` of it.
    out: a folder for the result, an ordinary checkpoint, with merge.json, curve.png and what the method writes.
    sequence_length, sequences, batch_size, special_tokens: of the text, see `transect.data.load`.
    parameters: the method's. settings: the same by its name.

    Raises TransectError before any work if the models do not fit, which names the tensor, or something cannot be done.
    """
    chosen = merging_named(method)
    given = chosen.settings(one_of(settings, {method: parameters})[method])
    if out is not None:
        check_output(out, overwrite)
    if len(models) < 2:
        raise TransectError(f"merging takes two models or more, and {len(models)} came")
    opened = [opened_of(one, tokenizer if number == 0 else None) for number, one in enumerate(models)]
    start = None if base is None else opened_of(base, None)
    every = [*opened, *([] if start is None else [start])]
    anatomies = [Anatomy(one.model) for one in every]
    names = [one.source or f"model {number + 1}" for number, one in enumerate(opened)]
    batches = None
    if curve is not None:
        batches = held_out_of(curve, opened[0], sequence_length, sequences, batch_size, seed, special_tokens)
    with nullcontext() if out is None else alone(Path(out)):
        made, outcome, files = merge_models(
            anatomies[: len(opened)], method, given, base=None if start is None else anatomies[-1],
            names=[*names, *([] if start is None else [start.source or "the base"])],
            tokenizers=[one.tokenizer for one in every], curve=batches, points=points, seed=seed, progress=progress,
        )  # fmt: skip
        merged = Merged(made, outcome, files)
        if out is not None:
            merged.save(out, opened[0].tokenizer or opened[0].processor, overwrite=overwrite)
    return merged
