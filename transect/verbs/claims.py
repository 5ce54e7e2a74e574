"""`transect.check_claims`: what papers say, measured on a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from ..arguments import checked
from ..checkpoint import open_model
from ..claims import Claim, Outcome, Result, claims, run_claims
from ..claims.records import KIND, finished, record_of, write_record
from ..compression.fingerprint import computation_fingerprint
from ..data import SpecialTokens
from ..errors import TransectError
from ..parameters import Seed, listed
from ..statistics import Progress
from ..store import Folder, alone
from .arguments import Count, Device, FolderName, Length, Share, Some, WeightType
from .common import CALIBRATION_SEQUENCES, calibration_of, held_out_of, opened_of, specimen_of


@checked
def check_claims(
    names: Sequence[str] = (),
    model: Any = "organism",
    data: Any = None,
    eval_data: Any = None,
    *,
    keep: Annotated[Sequence[Share], Some] | None = None,
    facts: Any = None,
    choices: Any = None,
    passages: Any = None,
    tokenizer: Any = None,
    revision: str | None = None,
    sequence_length: Length | None = None,
    special_tokens: SpecialTokens = "auto",
    sequences: Count | None = CALIBRATION_SEQUENCES,
    eval_sequences: Count | None = 128,
    batch_size: Count = 8,
    architecture: Any = None,
    dtype: WeightType = "float32",
    device: Device | None = None,
    seed: Seed = 0,
    record: FolderName | None = None,
    progress: Progress | None = None,
) -> list[Outcome]:
    """Check what papers claim of their methods on a model, which is as before afterwards.

    names: of claims, or of methods for all of their claims. Default: every claim.
    model, data, tokenizer and the calibration settings: as for `compress`. eval_data: held-out data, same forms. The
    bundled model has its own data as defaults.
    keep: shares of the bytes in (0, 1] at which claims about the order of compressed models compare them, instead of
    each claim's own (0.8, 0.6, 0.4 and 0.3 for most); the result says so. What takes long is quicker at one.
    facts, choices, passages: questions for claims about probes and edits, as for `inspect`.
    revision: of a model that is given by its hub name. dtype: in which one that is given by its name is opened;
    differences of thousandths drown in bfloat16.
    record: a folder into which each verdict is written as it is there, with what it was measured by; the same call goes
    on where it stopped. See `transect.claims.records`.

    Returns an outcome each: the claim, its verdict, the reason and the numbers.
    """
    keeps = tuple(float(share) for share in listed(keep or ()))
    claims(names)  # an unknown name is an error before anything is loaded
    bundled = isinstance(model, str) and model == "organism"
    called = str(model) if isinstance(model, (str, Path)) else type(model).__name__
    if bundled:
        data, eval_data = data or "organism:calibration", eval_data or "organism:heldout"
    elif data is None or eval_data is None:
        raise TransectError("a model of your own needs calibration data and held-out data (--data and --eval)")
    if isinstance(model, (str, Path)):
        model = open_model(model, revision=revision, dtype=dtype, device=device, architecture=architecture)
    opened = opened_of(model, tokenizer)
    calibration = calibration_of(data, opened, sequence_length, sequences, batch_size, seed, special_tokens)
    held_out = held_out_of(eval_data, opened, sequence_length, eval_sequences, batch_size, seed, special_tokens)
    specimen = specimen_of(
        opened, calibration, facts=facts, choices=choices, passages=passages, seed=seed, progress=progress,
        bundled=bundled,
    )  # fmt: skip
    if record is None:
        return run_claims(opened.model, calibration, held_out, names, progress, specimen, keeps=keeps)
    folder = Folder(Path(record).expanduser(), KIND)
    folder.check_place(among_others=True)
    settings = {
        "data": str(data), "eval": str(eval_data), "sequences": sequences, "eval_sequences": eval_sequences,
        "sequence_length": sequence_length, "batch_size": batch_size, "seed": seed,
        "model": computation_fingerprint(opened.model), "text": f"{calibration.fingerprint} {held_out.fingerprint}",
    } | ({"keep": keeps} if keeps else {})  # fmt: skip
    name = called if bundled or not Path(called).exists() else Path(called).resolve().name

    def known(claim: Claim) -> Result | None:
        found = finished(folder, claim.name, name, settings)
        return None if found is None else found.result

    def write(outcome: Outcome) -> None:
        write_record(folder, record_of(outcome, name, settings))

    with alone(folder.path):
        folder.take(among_others=True)
        return run_claims(opened.model, calibration, held_out, names, progress, specimen, known, write, keeps)
