"""Running probes on a model: one pass over the text for all that look at it, the others in turn."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from traceback import format_exception
from typing import Any

import torch
from torch import Tensor

from ..data import Specimen
from ..errors import NotApplicable, TransectError
from ..forward import Seen, at_rest, computing_wide, inputs_of, run_body, to_device, watch
from ..store import Folder
from .registry import Probe, probe
from .result import Result


@dataclass(frozen=True)
class Failure:
    """What went wrong in a probe. message: in a line; traceback: for whoever is to mend it."""

    message: str
    traceback: str

    @staticmethod
    def of(error: Exception) -> Failure:
        """From the exception; the name of its class goes before what a user is not meant to read."""
        kind = "" if isinstance(error, TransectError) else f"{type(error).__name__}: "
        return Failure(f"{kind}{' '.join(str(error).split())}", "".join(format_exception(error)))


@dataclass
class Inspection(Mapping[str, Result]):
    """Results by probe. refused: why others that were asked for say nothing about this model or data. failed: what went
    wrong in others."""

    results: dict[str, Result]
    refused: dict[str, str] = field(default_factory=dict)
    failed: dict[str, Failure] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Result:
        return self.results[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)


def run_probes(
    specimen: Specimen,
    wanted: Mapping[str, Mapping[str, Any]],
    folder: Folder | None = None,
    key: str = "",
    on_result: Callable[[str], None] = lambda name: None,
    named: Callable[[str], Probe] = probe,
) -> Inspection:
    """Run probes. The model is as before afterwards, also after an error: its weights, mode and hooks.

    On a CPU it computes in float32 meanwhile, whatever its weights are stored in (see `computing_wide`): in float16 the
    squares of a residual stream are soon infinite, and what a layer adds to it is rounded away.

    wanted: settings by probe name. folder: one of ours, where each result is written as soon as it is there; one
    that is there already, under the same key and settings, is read instead of computed. key: names model, data and
    questions.
    on_result: called with each probe's name when its result is there. named: gives the probe of a name.
    A probe that fails is among `failed`, and the others go on; if all fail, the first error is raised.
    Raises TransectError for an unknown probe or setting, before any work.
    """
    chosen = {name: (named(name), named(name).settings(settings)) for name, settings in wanted.items()}
    keys = {name: _key(key, settings) for name, (_, settings) in chosen.items()}
    inspection = Inspection({})
    errors: list[Exception] = []

    @contextmanager
    def noting(*names: str) -> Iterator[None]:
        """An exception inside is these probes' outcome."""
        try:
            yield
        except Exception as error:
            going = [name for name in names if name not in inspection.refused and name not in inspection.failed]
            if isinstance(error, NotApplicable):
                inspection.refused |= dict.fromkeys(going, str(error))
            else:
                errors.append(error)
                inspection.failed |= dict.fromkeys(going, Failure.of(error))

    def done(name: str, result: Result) -> None:
        result.probe, result.settings = name, chosen[name][1]
        inspection.results[name] = result
        if folder is not None:
            result.save(folder, keys[name])
        on_result(name)

    with at_rest(specimen.model, frozen=True), computing_wide(specimen.model):
        looking: dict[str, tuple[Probe, Generator[None, Seen | None, Result]]] = {}
        for name, (one, settings) in chosen.items():
            found = None if folder is None else Result.load(folder, name, keys[name])
            if found is not None:
                inspection.results[name] = found
                on_result(name)
                continue
            if one.streams:
                with noting(name):
                    looker = one.function(specimen, **settings)
                    next(looker)
                    looking[name] = (one, looker)
        if looking:
            _show_text(specimen, looking, noting)
        for name, (one, settings) in chosen.items():
            if any(name in found for found in (inspection.results, inspection.refused, inspection.failed)):
                continue
            result = None
            with noting(name):
                result = _finished(looking[name][1]) if name in looking else one.function(specimen, **settings)
            if result is not None:
                done(name, result)
    if errors and not inspection.results and not inspection.refused:
        raise errors[0]
    inspection.results = {name: inspection.results[name] for name in wanted if name in inspection.results}
    return inspection


def _show_text(specimen: Specimen, looking: dict[str, Any], noting: Callable[..., Any]) -> None:
    """Send every batch's activations to every probe that looks at them, as long as it can go on."""
    points = dict.fromkeys(point for one, _ in looking.values() for point in one.watches)
    with noting(*looking):  # what is wrong with the text or with the pass is so for all
        for batch in specimen.shown(specimen.text, "text"):
            instead = {"patterns": _of_patterns(looking, batch)}
            with (
                torch.no_grad(),
                watch(specimen.anatomy, [point for point in points if point != "logits"], instead=instead) as seen,  # type: ignore[misc]
            ):
                _forward(specimen, batch, seen, "logits" in points)
            of_patterns: dict[int, Any] = seen.patterns
            for name, (one, looker) in list(looking.items()):
                going = False
                with noting(name):
                    mine = {layer: made[name] for layer, made in of_patterns.items() if "patterns" in one.watches}
                    looker.send(replace(seen, patterns=mine))
                    going = True
                if not going:
                    del looking[name]


def _of_patterns(looking: Mapping[str, Any], batch: Mapping[str, Any]) -> Callable[[Tensor], dict[str, Tensor]]:
    """What each probe that asks for attention weights gets of a layer's."""
    wanted = {name: one.of_patterns for name, (one, _) in looking.items() if "patterns" in one.watches}
    mask = batch.get("attention_mask")

    def made(weights: Tensor) -> dict[str, Tensor]:
        real = None if mask is None else mask.to(weights.device).bool()
        return {name: weights if function is None else function(weights, real) for name, function in wanted.items()}

    return made


def _forward(specimen: Specimen, batch: Mapping[str, Any], seen: Seen, logits: bool) -> None:
    """One pass of the user's own model; without the head where nobody asks for logits."""
    model = specimen.model
    batch = to_device(batch, model.device)
    seen.ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    seen.mask = None if mask is None else mask.bool()
    if logits:
        seen.logits = model(**inputs_of(model, batch)).logits
    else:
        run_body(model, batch)


def _finished(looker: Generator[None, Seen | None, Result]) -> Result:
    try:
        looker.send(None)
    except StopIteration as stop:
        return stop.value
    raise RuntimeError("a probe that is sent None must return its Result")


def _files(name: str) -> list[Path]:
    """The file of that name; or the tensors, and what describes them, in the folder or in one that lies in it."""
    place = Path(name).expanduser()
    if os.path.isfile(place):
        return [place]
    if not os.path.isdir(place):
        return []
    kinds = ("*.safetensors", "*/*.safetensors", "*.json", "*/*.json")
    return sorted(file for kind in kinds for file in place.glob(kind) if file.is_file())


def _key(key: str, settings: Mapping[str, Any]) -> str:
    """Names all that decides a result; where a setting names a file, or a folder of tensors, what is in it too."""
    named = [value for value in settings.values() if isinstance(value, str) and value]
    contents = [hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest() for one in named for file in _files(one)]
    described = json.dumps([key, settings, contents], sort_keys=True)
    return hashlib.blake2b(described.encode(), digest_size=16).hexdigest()
