"""`transect study`: small models are trained to answer a question about trained models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..group import main_group
from ..method_options import StudyCommand, method_settings, refuse_unused
from ..options import Place, shared_options
from ..printing import print_whole, progress_bar


@main_group.command(cls=StudyCommand)
@click.argument("name")
@click.option("--out", type=Place(), required=True, help="Folder for the report; a study in it is continued.")
@shared_options("seed", "device", "json")
@click.pass_context
def study(context: click.Context, name: str, out: Path, seed: int, device: str | None, as_json: bool) -> None:
    """Train small models of its own and say what came out, as one HTML report.

    NAME is one of the studies below; nothing of yours is needed.
    """
    from ...store import alone
    from ...studies import study_named
    from ...verbs import study as run

    chosen = study_named(name)
    settings: dict[str, Any] = method_settings(context.obj, name)
    refuse_unused(settings, [name])
    own = chosen.settings(settings.get(name, {}))
    with alone(out), progress_bar(as_json) as (_, show):
        found = run(name, out=out, seed=seed, device=device or "cpu", progress=show, **own)
    if as_json:
        click.echo(json.dumps({"out": str(out), "settings": own, "findings": list(found.findings)}))
        return
    for finding in found.findings:
        print_whole(f"{name}: {finding}")
    written = "".join(f"   {file}: {out / file}" for file in chosen.files)
    print_whole(f"\nreport: {out / 'index.html'}   raw data: {out / 'data'}{written}")
