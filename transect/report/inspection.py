"""The report of an inspection or a study: one HTML page that needs no network, its plots and the raw data beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup

from ..data import Specimen
from ..errors import TransectError
from ..probes import Drawing, Failure, Inspection, Listing, Plot, Probe, Result, drawings, probe
from ..store import Folder, write_text
from ..studies import Study
from .number import in_a_cell

INDEX = "index.html"


LEAD = "What its weight matrices, MLP layers, heads and depth are doing, as measured by Transect."


def write_report(
    folder: Folder, found: Inspection, specimen: Specimen, named: Callable[[str], Probe] = probe, lead: str = LEAD
) -> Path:
    """Write index.html into the folder whose `data` holds the results; returns its path.

    named: gives the probe of a name. lead: what the page is about, a sentence under its heading.
    """
    return _write(folder, found, _model(specimen) | {"lead": lead}, named)


def write_study(folder: Folder, study: Study, result: Result, seed: int, device: str) -> Path:
    """The same page for a study, with its settings where a model's sizes would stand; returns its path."""
    facts = [*result.settings.items(), ("seed", seed), ("device", device)]
    head = {"name": study.title, "lead": study.summary, "facts": facts, "files": study.files}
    found = Inspection({study.name: result})
    path = _write(folder, found, head, lambda name: study)
    if found.failed:
        raise TransectError(f"{found.failed[study.name].message}; {path} says where")
    return path


def _write(folder: Folder, found: Inspection, head: Mapping[str, Any], named: Callable[[str], Probe]) -> Path:
    """head: what the top of the page says of the model."""
    environment = Environment(loader=PackageLoader("transect.report"), autoescape=select_autoescape())
    sections = [_section(named(name), result, found.failed) for name, result in found.items()]
    plots = any("figure" in drawing for section in sections for drawing in section["drawings"])
    page = environment.get_template("inspection.html").render(
        model=head, sections=sections, plots=plots,
        refused=list(found.refused.items()), failed=list(found.failed.items()),
        plotly=_plotly() if plots else "",
    )  # fmt: skip
    path = folder.file(INDEX)
    write_text(path, page)
    return path


def _plotly() -> Markup:
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs().replace("</script", "<\\/script"))


def _model(specimen: Specimen) -> dict[str, Any]:
    """What the head of the page says of the model."""
    model, anatomy = specimen.model, specimen.anatomy
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    types = dict.fromkeys(str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters())
    text = specimen.data
    facts: list[tuple[str, Any]] = [
        ("class", type(model).__name__),
        ("parameters", f"{parameters:,}"),
        ("bytes", f"{size:,}"),
        ("type of weights", ", ".join(types)),
        ("blocks", specimen.layers),
        ("width", anatomy.config_value("hidden")),
        ("attention heads", anatomy.config_value("heads")),
        ("key/value heads", anatomy.config_value("key_value_heads")),
        ("MLP neurons a block", anatomy.config_value("neurons")),
        ("vocabulary", f"{model.config.vocab_size:,}" if hasattr(model.config, "vocab_size") else None),
        ("embeddings tied", "yes" if anatomy.embeddings_tied else "no"),
        ("text looked at", None if text is None else f"{text.tokens:,} tokens in {text.examples:,} sequences"),
    ]
    named = specimen.name or getattr(model, "name_or_path", "") or type(model).__name__
    return {
        "name": Path(named).name,
        "facts": [(name, value) for name, value in facts if value is not None],
    }


def _section(one: Probe, result: Result, failed: dict[str, Failure]) -> dict[str, Any]:
    """One probe's part of the page. Plots that cannot be drawn are a failure of the probe; the rest stands."""
    name, drawn = one.name, []
    try:
        drawn = drawings(result, one)
    except Exception as error:
        failed[name] = Failure.of(error)
    return {
        "name": name, "title": one.title, "summary": one.summary,
        "papers": [{"name": paper, "link": _link(paper)} for paper in one.paper.split(", ")],
        "findings": list(result.findings), "caveats": list(result.caveats),
        "settings": ", ".join(f"{key}={value}" for key, value in result.settings.items()),
        "drawings": [_drawing(f"{name}-{number}", drawing) for number, drawing in enumerate(drawn)],
    }  # fmt: skip


def _link(paper: str) -> str | None:
    return f"https://arxiv.org/abs/{paper.removeprefix('arXiv:')}" if paper.startswith("arXiv:") else None


def _drawing(identifier: str, drawing: Drawing) -> Mapping[str, Any]:
    described: dict[str, Any] = {"id": identifier, "title": drawing.title, "note": drawing.note}
    if isinstance(drawing, Plot):
        figure = json.dumps(json.loads(drawing.figure.to_json()))
        return {**described, "figure": Markup(figure.replace("<", "\\u003c"))}
    if isinstance(drawing, Listing):
        return {**described, "listing": drawing.text}
    numeric = [
        bool(drawing.rows) and all(isinstance(row[column], (int, float)) for row in drawing.rows)
        for column in range(len(drawing.columns))
    ]
    kinds = ["number" if number else "" for number in numeric]
    return {
        **described,
        "columns": [{"name": name, "kind": kind} for name, kind in zip(drawing.columns, kinds, strict=True)],
        "rows": [
            [{"text": in_a_cell(cell), "kind": kind} for cell, kind in zip(row, kinds, strict=True)]
            for row in drawing.rows
        ],
    }
