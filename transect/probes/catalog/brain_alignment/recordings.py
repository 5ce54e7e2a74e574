"""Recordings of many channels while words were heard or read: fMRI, electrodes, or another model's units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....data.sources import check_file
from ....errors import BadData

FORMAT = (
    ".npz with `responses` (samples x channels, or repeats x samples x channels), `words`, `onsets` (seconds from the "
    "first sample) and `interval` (seconds from sample to sample), or .csv with a row a sample, its `words`, and a "
    "column of numbers for each channel"
)


@dataclass(frozen=True)
class Recording:
    """Responses to words, sample by sample.

    responses: R x N x V, float64: repeats (or subjects) of the same words, samples, channels. words: those that began
    during each sample (N), in their order. runs: number of the run of each sample (N), not decreasing; nothing goes
    over from one run to the next. names: of the channels.
    Raises BadData for gaps, for a channel that never changes, and for parts that do not fit.
    """

    responses: Tensor
    words: Sequence[Sequence[str]]
    runs: Tensor
    names: Sequence[str] = field(default=())

    def __post_init__(self) -> None:
        repeats, samples, channels = self.responses.shape
        if not samples or not channels or not repeats:
            raise BadData(f"the recording is empty: {repeats} repeats of {samples} samples of {channels} channels")
        for what, count, wanted in (
            ("samples with words", len(self.words), samples), ("samples in runs", len(self.runs), samples),
            ("names of channels", len(self.names) or channels, channels),
        ):  # fmt: skip
            if count != wanted:
                raise BadData(f"the recording has {wanted} {what.split()[0]}, but {count} {what}")
        if bool((self.runs.diff() < 0).any()):
            raise BadData("the samples of a recording's run must follow one another, and the runs be numbered upwards")
        if not self.names:
            object.__setattr__(self, "names", [f"channel {number}" for number in range(channels)])
        if not any(self.words):
            raise BadData("the recording has no words")
        self._refuse(~self.responses.isfinite(), "has gaps (NaN or infinite)", "fill or leave out those samples")
        still = self.responses == self.responses[:, :1]
        if bool(still.all(1).any()):
            self._refuse(still.all(1, keepdim=True), "never changes", "leave it out")

    def _refuse(self, wrong: Tensor, what: str, remedy: str) -> None:
        """BadData that names the first channel of which anything (R x N or 1 x V) is wrong."""
        places = wrong.nonzero()
        if len(places):
            count = len(places[:, 2].unique())
            repeat, sample, channel = places[0].tolist()
            where = f" at sample {sample}" if wrong.shape[1] > 1 else ""
            again = f" of repeat {repeat}" if len(self.responses) > 1 else ""
            more = f", and {count - 1} other channels" if count > 1 else ""
            raise BadData(f"{self.names[channel]!r}{again} of the recording {what}{where}{more}; {remedy}")


def load_recording(path: str | Path) -> Recording:
    """A recording from a file.

    .npz, without pickled objects: `responses` (N x V, or R x N x V), `words` (W texts), `onsets` (W, seconds from the
    beginning of the first sample, not decreasing) and `interval` (seconds); sample n has the words that begin in
    [n, n + 1) intervals. Where there are several runs, `runs` (N numbers), and time goes on through them; `names` (V
    texts) if there are any.

    .csv, with a header: a row a sample; `words` (text, which may be empty), `run` and `repeat` if there are several;
    every other column is a channel. Every repeat has the same rows but for the numbers.

    Raises BadData, which says what is wrong, also for gaps and for channels that never change.
    """
    file = Path(path).expanduser()
    if file.suffix not in (".npz", ".csv"):
        raise BadData(f"a recording is a file of this kind: {FORMAT}; got {str(path)!r}")
    check_file(file, "the recording")
    return _npz(file) if file.suffix == ".npz" else _csv(file)


def _npz(file: Path) -> Recording:
    try:
        with np.load(file, allow_pickle=False) as found:
            parts: dict[str, Any] = {name: found[name] for name in found.files}
    except Exception as error:  # a damaged archive raises what zipfile, zlib or numpy please
        raise BadData(f"{file} cannot be read as .npz without pickled objects: {error}") from None
    missing = [name for name in ("responses", "words", "onsets", "interval") if name not in parts]
    if missing:
        raise BadData(f"{file} has no {', '.join(missing)}; it has {', '.join(parts) or 'nothing'}. Expected: {FORMAT}")
    responses = _numbers(parts["responses"], file, "responses", (2, 3))
    responses = responses if responses.dim() == 3 else responses[None]
    samples = responses.shape[1]
    onsets, interval = _numbers(parts["onsets"], file, "onsets", (1,)), _numbers(parts["interval"], file, "interval")
    words = [str(word).strip() for word in np.atleast_1d(parts["words"])]
    if len(words) != len(onsets):
        raise BadData(f"{file} has {len(words)} words, but {len(onsets)} onsets")
    if not float(interval) > 0:
        raise BadData(f"the interval of {file} must be above 0 seconds, and is {float(interval):g}")
    if not bool(onsets.isfinite().all()) or bool((onsets.diff() < 0).any()) or bool((onsets < 0).any()):
        raise BadData(f"the onsets of {file} must be seconds from 0 on, in the order of the words")
    places = ((onsets + 1e-9) / interval).long().tolist()
    if places and places[-1] >= samples:
        raise BadData(
            f"the words of {file} go on until {float(onsets[-1]):g} s, but {samples} samples of {float(interval):g} s "
            f"end at {samples * float(interval):g} s: words and responses are not of the same recording, or the "
            "interval is wrong"
        )
    heard: list[list[str]] = [[] for _ in range(samples)]
    for place, word in zip(places, words, strict=True):
        if word:
            heard[place] += word.split()
    runs = torch.from_numpy(np.asarray(parts["runs"])).long() if "runs" in parts else torch.zeros(samples).long()
    return Recording(responses, heard, runs, [str(name) for name in np.atleast_1d(parts.get("names", []))])


def _numbers(values: Any, file: Path, name: str, dimensions: tuple[int, ...] = (0,)) -> Tensor:
    if values.dtype.kind not in "fiu" or values.ndim not in dimensions:
        raise BadData(
            f"`{name}` of {file} should hold numbers in {' or '.join(map(str, dimensions))} dimensions, not "
            f"{values.dtype} of shape {values.shape}"
        )
    return torch.from_numpy(values.astype(np.float64))


def _csv(file: Path) -> Recording:
    import pandas as pd

    try:
        table = pd.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (ValueError, OSError) as error:  # what pandas raises for a table that is none is a ValueError
        raise BadData(f"{file} cannot be read as .csv: {' '.join(str(error).split())}") from None
    names = [name for name in table.columns if name not in ("words", "run", "repeat")]
    if "words" not in table or not names:
        raise BadData(f"{file} has the columns {', '.join(table.columns)}. Expected: {FORMAT}")
    if table.empty:
        raise BadData(f"{file} is empty below its header")
    repeats = table["repeat"].tolist() if "repeat" in table else [""] * len(table)
    groups = [np.array([n for n, other in enumerate(repeats) if other == one]) for one in dict.fromkeys(repeats)]
    runs = table["run"].tolist() if "run" in table else [""] * len(table)
    whole = np.stack([_column(table[name].tolist(), f"the column {name!r} of {file}") for name in names], 1)
    texts = table["words"].tolist()
    first = groups[0]
    for rows in groups[1:]:
        if [(texts[n], runs[n]) for n in rows] != [(texts[n], runs[n]) for n in first]:
            raise BadData(
                f"repeat {repeats[rows[0]]!r} of {file} has {len(rows)} samples that are not those of the first one "
                f"({len(first)}): every repeat must have the same words and runs in the same order"
            )  # fmt: skip
    numbered = [number for number, (_, same) in enumerate(groupby(runs[n] for n in first)) for _ in same]
    responses = torch.from_numpy(np.stack([whole[rows] for rows in groups]))
    return Recording(responses, [texts[n].split() for n in first], torch.tensor(numbered), names)


def _column(cells: list[str], what: str) -> Any:
    """Numbers of a column of text; an empty cell is a gap."""
    stripped = [cell.strip() for cell in cells]
    try:
        return np.array([cell if cell not in ("", "NA") else "nan" for cell in stripped]).astype(np.float64)
    except ValueError as error:
        raise BadData(f"{what} should hold numbers: {error}") from None
