"""`transect inspect`: a report of what a model is doing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..group import main_group
from ..method_options import ProbeCommand, method_settings, refuse_unused
from ..options import LOADING, Place, opening, shared_options, split
from ..printing import print_whole, progress_bar, stderr


@main_group.command(cls=ProbeCommand)
@click.argument("model")
@click.option("--data", help="Text to look at. Default with the bundled model: organism:calibration.")
@click.option(
    "--probes",
    callback=split,
    help="Comma-separated; see the list below. Default: all that train nothing of their own, and those with settings.",
)
@click.option("--out", type=Place(), required=True,
              help="Folder for the report; an inspection in it is continued.")  # fmt: skip
@click.option("--sequences", type=int, default=64, show_default=True, help="Sequences, spread evenly over the text.")
@click.option("--batch-size", type=int, default=4, show_default=True)
@shared_options("facts", "choices", "passages", "inspected_length", "special_tokens", "seed", *LOADING, "json")
@click.pass_context
def inspect(
    context: click.Context, model: str, probes: list[str] | None, out: Path, as_json: bool, **options: Any
) -> None:
    """Look inside MODEL: its weight matrices, MLP layers, heads and depth, as one HTML report."""
    from ...checkpoint import open_model
    from ...errors import TransectError
    from ...probes import names_of, probe
    from ...store import alone
    from ...verbs import inspect as inspect_model

    settings = method_settings(context.obj, probes[0] if probes is not None and len(probes) == 1 else None)
    names = names_of(probes, settings)
    refuse_unused(settings, names)
    for name in names:
        probe(name).settings(settings.get(name, {}))
    with alone(out), progress_bar(as_json) as (_, show):

        def say(name: str) -> None:
            if not as_json:
                stderr.print(f"{name}: done")

        opened = open_model(model, **opening(options))
        found = inspect_model(
            opened, names, options.pop("data"), out=out, settings=settings, progress=show, on_result=say, **options
        )
    if as_json:
        findings = {name: list(result.findings) for name, result in found.items()}
        failed = {name: failure.message for name, failure in found.failed.items()}
        click.echo(json.dumps({"out": str(out), "findings": findings, "refused": found.refused, "failed": failed}))
    else:
        _print(found, out)
    if found.failed:
        raise TransectError(f"{', '.join(found.failed)} failed; {out / 'index.html'} says where")


def _print(found: Any, out: Path) -> None:
    """A line for every probe of an `Inspection`."""
    for name, result in found.items():
        print_whole(f"{name}: {result.findings[0] if result.findings else 'nothing to say'}")
    for name, reason in found.refused.items():
        print_whole(f"{name} was not run: {reason}")
    for name, failure in found.failed.items():
        print_whole(f"{name} failed: {failure.message}")
    print_whole(f"\nreport: {out / 'index.html'}   raw data: {out / 'data'}")
