"""`transect.diff`: what differs between two checkpoints of one model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from ..arguments import checked
from ..compression.fingerprint import computation_fingerprint
from ..data import SpecialTokens
from ..difference import comparison, comparisons, pair_of
from ..forward import at_rest, computing_wide
from ..parameters import Seed, listed
from ..probes import Inspection, Result, run_probes
from ..report import INDEX, write_report
from ..statistics import Progress
from ..store import Folder, alone
from ..version import __version__
from .arguments import Count, FolderName, Length, Some
from .common import fingerprint_of, specimen_of
from .inspect import INSPECTION_LENGTH, INSPECTION_SEQUENCES

KIND = "a difference"  # what the folder of one is


@checked
def diff(
    model: Any,
    other: Any,
    data: Any = None,
    *,
    what: Annotated[Sequence[str], Some] | None = None,
    facts: Any = None,
    passages: Any = None,
    out: FolderName | None = None,
    tokenizer: Any = None,
    sequence_length: Length | None = None,
    special_tokens: SpecialTokens = "auto",
    sequences: Count | None = INSPECTION_SEQUENCES,
    batch_size: Count = 4,
    seed: Seed = 0,
    progress: Progress | None = None,
    on_result: Callable[[str], None] = lambda name: None,
) -> Inspection:
    """What differs between two checkpoints of one model, compressed, quantised, edited, converted or fine-tuned.

    model: the first, as it was. other: the second, which came from it; both Hugging Face models, or names of some.
    data: text that both read; see `transect.data.load`. The bundled model has its own as default.
    what: `weights` (matrices, heads, neurons), `text` (streams, predictions), `knowledge` (facts and passages that were
        lost or gained), `loss` (of each block's change, predicted and measured). Default: all that can be said.
    facts, passages: questions, see `transect.data.load_facts`; `common` are ours.
    out: a folder for the report (index.html) and the raw results (data). The same call goes on where it stopped.
    sequence_length, sequences, batch_size, special_tokens: of the text, see `transect.data.load`; sequences have at
        most 512 tokens unless told otherwise.
    on_result: called with a comparison's name when its result is there.

    Both models are as before afterwards. Raises TransectError where they are not checkpoints of one model.
    """
    names = comparisons() if what is None else listed(what)
    for name in names:
        comparison(name)
    folder = None if out is None else Folder(Path(out).expanduser(), KIND)
    if folder is not None:
        folder.check_place(among_others=True)
        folder.check(INDEX, *(file for name in names for file in Result.files(name)))
    options = dict(tokenizer=tokenizer, length=sequence_length, sequences=sequences, batch_size=batch_size, seed=seed,
                   special_tokens=special_tokens, progress=progress, longest=INSPECTION_LENGTH)  # fmt: skip
    first = specimen_of(model, data, facts=facts, passages=passages, **options)  # type: ignore[arg-type]
    second = specimen_of(other, None, bundled=False, tokenizer=first.tokenizer)
    pair = pair_of(first, replace(second, data=first.data))
    key = hashlib.blake2b(digest_size=16)
    key.update(f"{__version__} {computation_fingerprint(pair.model)} {computation_fingerprint(second.model)}".encode())
    key.update(b"" if pair.data is None else pair.data.fingerprint.encode())
    key.update(f"{seed} {fingerprint_of(pair.tokenizer, pair.known_facts, pair.known_passages)}".encode())
    with at_rest(second.model, frozen=True), computing_wide(second.model):
        if folder is None:
            return run_probes(pair, {name: {} for name in names}, None, key.hexdigest(), on_result, comparison)
        with alone(folder.path):
            folder.take(among_others=True)
            found = run_probes(pair, {name: {} for name in names}, folder, key.hexdigest(), on_result, comparison)
            named = second.name or type(second.model).__name__
            lead = f"What differs between this model and {Path(named).name}, which came from it, measured by Transect."
            write_report(folder, found, pair, comparison, lead)
    return found
