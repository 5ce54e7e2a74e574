"""`transect diff`: what differs between two checkpoints of one model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..group import main_group
from ..options import LOADING, Place, opening, shared_options, split
from ..printing import print_whole, progress_bar, stderr


@main_group.command()
@click.argument("model")
@click.argument("other")
@click.option("--data", help="Text that both read. Default with the bundled model: organism:calibration.")
@click.option("--what", callback=split, help="Of weights, text, knowledge, loss; comma-separated. Default: all.")
@click.option("--out", type=Place(), required=True, help="Folder for the report; a difference in it is continued.")
@click.option("--sequences", type=int, default=64, show_default=True, help="Sequences, spread evenly over the text.")
@click.option("--batch-size", type=int, default=4, show_default=True)
@shared_options("facts", "passages", "inspected_length", "special_tokens", "seed", *LOADING, "json")
def diff(model: str, other: str, out: Path, as_json: bool, what: list[str] | None, **options: Any) -> None:
    """Say what differs between MODEL and OTHER, which came from it, as one HTML report."""
    from ...checkpoint import open_model
    from ...difference import comparison
    from ...errors import TransectError
    from ...store import alone
    from ...verbs import diff as diff_models

    for name in what or ():
        comparison(name)
    with alone(out), progress_bar(as_json) as (_, show):

        def say(name: str) -> None:
            if not as_json:
                stderr.print(f"{name}: done")

        loading = opening(options)
        first, second = open_model(model, **loading), open_model(other, **loading)
        found = diff_models(
            first, second, options.pop("data"), out=out, what=what, progress=show, on_result=say, **options
        )
    if as_json:
        findings = {name: list(result.findings) for name, result in found.items()}
        failed = {name: failure.message for name, failure in found.failed.items()}
        click.echo(json.dumps({"out": str(out), "findings": findings, "refused": found.refused, "failed": failed}))
    else:
        for name, result in found.items():
            for finding in result.findings:
                print_whole(f"{name}: {finding}")
        for name, reason in found.refused.items():
            print_whole(f"{name} was not run: {reason}")
        for name, failure in found.failed.items():
            print_whole(f"{name} failed: {failure.message}")
        print_whole(f"\nreport: {out / 'index.html'}   raw data: {out / 'data'}")
    if found.failed:
        raise TransectError(f"{', '.join(found.failed)} failed; {out / 'index.html'} says where")
