"""`transect.inspect`: what a model's weights, layers, heads and neurons are doing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from ..arguments import checked
from ..compression.fingerprint import computation_fingerprint
from ..data import SpecialTokens, Specimen
from ..parameters import Seed
from ..probes import KIND, Inspection, Result, names_of, probe, run_probes
from ..report import INDEX, write_report
from ..statistics import Progress
from ..store import Folder, alone
from ..version import __version__
from .arguments import Count, FolderName, Length, Some
from .common import Settings, fingerprint_of, specimen_of

INSPECTION_SEQUENCES = 64
INSPECTION_LENGTH = 512  # tokens: several probes look at all of the text many times


@checked
def inspect(
    model: Any,
    probes: Annotated[Sequence[str], Some] | None = None,
    data: Any = None,
    *,
    facts: Any = None,
    choices: Any = None,
    passages: Any = None,
    out: FolderName | None = None,
    tokenizer: Any = None,
    sequence_length: Length | None = None,
    special_tokens: SpecialTokens = "auto",
    sequences: Count | None = INSPECTION_SEQUENCES,
    batch_size: Count = 4,
    seed: Seed = 0,
    settings: Settings | None = None,
    progress: Progress | None = None,
    on_result: Callable[[str], None] = lambda name: None,
) -> Inspection:
    """Run probes on a model, which is as before afterwards. Returns their results by name.

    model: a Hugging Face model, or the name of one (a folder, a hub name, or `organism`).
    probes: see `transect.probes.probes()`. Default: all that can say something about this model and data, but for
        those that train something of their own (a dictionary, a mask) and have no settings here.
    data: text as for `compress`. facts, choices, passages: questions about what the model knows, see
        `transect.data.load_facts`, `load_choices` and `load_passages`. The bundled model, called by its name, has all
        of these as defaults.
    out: a folder for the report (index.html) and the raw results (data). The same call goes on where it was
        interrupted. Other files may lie in it and are left alone; one of a name that the report needs is refused.
    sequence_length, sequences, batch_size, special_tokens: of the text, see `transect.data.load`; sequences are spread
        evenly over it, None takes all, and have at most 512 tokens unless told otherwise. Memory is that of one batch's
        activations, whatever the amount of text.
    settings: of the probes, by name: {"lazy-neuron": {"mass": 0.9}}.
    on_result: called with a probe's name when its result is there.

    Raises TransectError for an unknown probe or setting before any work. A probe that was asked for by name and cannot
    say anything is among `refused`, with the reason. One that fails is among `failed`, and the others go on; if all
    fail, the first error is raised.
    """
    settings = dict(settings or {})
    names = names_of(probes, settings)
    for name in [*names, *settings]:
        probe(name).settings(settings.get(name, {}))
    folder = None if out is None else Folder(Path(out).expanduser(), KIND)
    if folder is not None:
        folder.check_place(among_others=True)
        folder.check(INDEX, *(file for name in names for file in Result.files(name)))
    specimen = specimen_of(
        model, data, facts=facts, choices=choices, passages=passages, tokenizer=tokenizer,
        length=sequence_length, sequences=sequences, batch_size=batch_size, seed=seed, special_tokens=special_tokens,
        progress=progress, longest=INSPECTION_LENGTH,
    )  # fmt: skip
    chosen = {name: settings.get(name, {}) for name in names}
    if folder is None:
        return run_probes(specimen, chosen, None, _key(specimen), on_result)
    with alone(folder.path):
        folder.take(among_others=True)
        found = run_probes(specimen, chosen, folder, _key(specimen), on_result)
        write_report(folder, found, specimen)
    return found


def _key(specimen: Specimen) -> str:
    """Names the model, the text and the questions, so that a result is not taken for another's."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{__version__} {computation_fingerprint(specimen.model)}".encode())
    digest.update(b"" if specimen.data is None else specimen.data.fingerprint.encode())
    asked = (specimen.known_facts, specimen.known_choices, specimen.known_passages)
    digest.update(f"{specimen.seed} {fingerprint_of(specimen.tokenizer, *asked)}".encode())
    return digest.hexdigest()
