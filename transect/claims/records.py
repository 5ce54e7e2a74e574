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

from ..errors import BadData, TransectError
from ..store import Folder, read_any_json, write_text
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
    write_text(folder.file(record.file), json.dumps(asdict(record), indent=1) + "\n")


def records_in(folder: str | Path = SHIPPED) -> list[Record]:
    """All records in a folder, by model and claim. BadData, naming the file, for one that is none."""
    found = []
    for path in sorted(Path(folder).rglob("*.json")):
        entry = read_any_json(path)
        try:
            record = Record(**entry)
            _ = record.result
        except (TypeError, ValueError, AttributeError) as error:
            raise BadData(f"{path} is no recorded claim: {error}") from None
        found.append(record)
    return found


def finished(folder: Folder, claim: str, model: str, settings: Mapping[str, Any]) -> Record | None:
    """The record of that claim and model in the folder, of this version and these settings; None if there is none."""
    path = folder.path / Record(claim, "", "", "", model, "", "").file
    if not path.is_file():
        return None
    try:
        record = Record(**read_any_json(path))
    except (TypeError, TransectError):
        return None  # damaged: measured again
    same = record.version == __version__ and dict(record.settings) == dict(settings)
    return record if same and record.verdict != str(Verdict.FAILED) else None
