"""Running probes on a model: one pass over the text for all that look at it, the others in turn."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..data import Specimen
from ..errors import NotApplicable
from ..forward import Seen, at_rest, inputs_of, run_body, to_device, watch
from .registry import Probe, probe
from .result import Result


@dataclass
class Inspection(Mapping[str, Result]):
    """Results by probe. refused: why the other probes that were asked for say nothing about this model or data."""

    results: dict[str, Result]
    refused: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Result:
        return self.results[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)


def run_probes(
    specimen: Specimen,
    wanted: Mapping[str, Mapping[str, Any]],
    folder: Path | None = None,
    key: str = "",
    on_result: Callable[[str], None] = lambda name: None,
) -> Inspection:
    """Run probes. The model is as before afterwards, also after an error: its weights, mode and hooks.

    wanted: settings by probe name. folder: where each result is written as soon as it is there; one that is there
    already, under the same key and settings, is read instead of computed. key: names model, data and questions.
    on_result: called with each probe's name when its result is there.
    Raises TransectError for an unknown probe or setting, before any work.
    """
    chosen = {name: (probe(name), probe(name).settings(settings)) for name, settings in wanted.items()}
    inspection = Inspection({})

    def done(name: str, result: Result) -> None:
        result.probe, result.settings = name, chosen[name][1]
        inspection.results[name] = result
        if folder is not None:
            result.save(folder, _key(key, result.settings))
        on_result(name)

    with at_rest(specimen.model, frozen=True):
        looking: dict[str, tuple[Probe, Generator[None, Seen | None, Result]]] = {}
        for name, (one, settings) in chosen.items():
            found = None if folder is None else Result.load(folder, name, _key(key, settings))
            if found is not None:
                inspection.results[name] = found
                on_result(name)
                continue
            try:
                if one.streams:
                    looker = one.function(specimen, **settings)
                    next(looker)
                    looking[name] = (one, looker)
            except NotApplicable as reason:
                inspection.refused[name] = str(reason)
        if looking:
            _show_text(specimen, looking, inspection)
        for name, (one, settings) in chosen.items():
            if name in inspection.results or name in inspection.refused:
                continue
            try:
                if name in looking:
                    done(name, _finished(looking[name][1]))
                else:
                    done(name, one.function(specimen, **settings))
            except NotApplicable as reason:
                inspection.refused[name] = str(reason)
    inspection.results = {name: inspection.results[name] for name in wanted if name in inspection.results}
    return inspection


def _show_text(specimen: Specimen, looking: dict[str, Any], inspection: Inspection) -> None:
    """Send every batch's activations to every probe that looks at them."""
    try:
        text = specimen.text
    except NotApplicable as reason:
        inspection.refused |= dict.fromkeys(looking, str(reason))
        return
    points = dict.fromkeys(point for one, _ in looking.values() for point in one.watches)
    for batch in specimen.shown(text, "text"):
        with torch.no_grad(), watch(specimen.anatomy, [point for point in points if point != "logits"]) as seen:  # type: ignore[misc]
            _forward(specimen, batch, seen, "logits" in points)
        for name, (_, looker) in list(looking.items()):
            try:
                looker.send(seen)
            except NotApplicable as reason:
                inspection.refused[name] = str(reason)
                del looking[name]


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


def _key(key: str, settings: Mapping[str, Any]) -> str:
    return hashlib.blake2b(f"{key} {json.dumps(settings, sort_keys=True)}".encode(), digest_size=16).hexdigest()
