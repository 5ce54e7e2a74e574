"""Verdicts as files: what was measured, of which claim, on which model, with what, and when."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..arguments import checked_fields
from ..errors import BadData
from ..store import Folder, keep_json, kept_json, read_json, without_marks
from ..version import __version__
from .registry import Result, Verdict
from .run import Outcome

KIND = "recorded claims"  # what a folder of them is, see `transect.store.Folder`
SHIPPED = Path(__file__).parent / "recorded"  # those that come with the package


@dataclass(frozen=True)
class Record:
    """One verdict.

    claim, method, paper, statement: see `Claim`. model: what the user calls it. verdict, explanation, numbers: see
    `Result`. settings: of the run (text, sequences, seed ...). version: of Transect. date: ISO, UTC. machine: processor
    architecture, threads, and the version of torch.
    """

    claim: str
    method: str
    paper: str
    statement: str
    model: str
    verdict: str
    explanation: str
    numbers: Sequence[Mapping[str, Any]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    version: str = ""
    date: str = ""
    machine: str = ""

    @property
    def file(self) -> str:
        """Its name within a folder of records."""
        return f"{self.model.replace('/', '--').replace(':', '-')}/{self.claim.replace('/', '.')}.json"

    @property
    def result(self) -> Result:
        """Verdict, explanation and numbers, as the claim returned them."""
        return Result(Verdict(self.verdict), self.explanation, [dict(row) for row in self.numbers])


def record_of(outcome: Outcome, model: str, settings: Mapping[str, Any]) -> Record:
    """The outcome with what it was measured by."""
    claim, result = outcome.claim, outcome.result
    return Record(
        claim.name, claim.method, claim.paper, claim.statement, model, str(result.verdict), result.explanation,
        json.loads(json.dumps(result.numbers, default=str)), dict(settings), __version__,
        datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    )  # fmt: skip


def write_record(folder: Folder, record: Record) -> None:
    """Into a folder of ours; an older one of the same claim and model is replaced."""
    keep_json(folder.file(record.file), asdict(record), _belongs(record))


def records_in(folder: str | Path = SHIPPED) -> list[Record]:
    """All records in a folder, by model and claim. BadData, naming the file, for one that is none."""
    found = []
    for path in sorted(Path(folder).rglob("*.json")):
        try:
            found.append(_record(without_marks(read_json(path))))
        except (TypeError, ValueError) as error:
            raise BadData(f"{path} is no recorded claim: {error}") from None
    return found


def finished(folder: Folder, claim: str, model: str, settings: Mapping[str, Any]) -> Record | None:
    """The record of that claim and model in the folder, of this version and these settings; None if there is none."""
    wanted = Record(claim, "", "", "", model, "", "", settings=settings, version=__version__)
    kept = kept_json(folder.path / wanted.file, _belongs(wanted))
    if kept is None:
        return None
    try:
        record = _record(kept)
    except (TypeError, ValueError):  # made up, with a checksum that is right: measured again
        return None
    return record if record.verdict != str(Verdict.FAILED) else None


def _belongs(record: Record) -> str:
    """What decides a verdict, as text."""
    return json.dumps([record.claim, record.model, record.version, record.settings], sort_keys=True, default=str)


def _record(entry: Mapping[str, Any]) -> Record:
    """TypeError or ValueError (TransectError is one) for what is none."""
    record = checked_fields(Record(**entry), "it")
    _ = record.result  # an unknown verdict
    return record
