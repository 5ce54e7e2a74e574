"""`transect check-architecture`: whether a description of an architecture is true."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import click
from rich.table import Table

from ..group import main_group
from ..options import shared_options
from ..printing import print_whole, stdout


@main_group.command("check-architecture")
@click.argument("description", required=False, metavar="[FILE]")
@click.option("--model", metavar="MODEL", help="Check it on a tiny random model with this model's class and config.")
@shared_options("json")
def check_architecture(description: str | None, model: str | None, as_json: bool) -> None:
    """Check a JSON description of an architecture on a tiny random model; without FILE, list what is built in.

    FILE may also be the model_type of a description that is built in. Exit code 1 if a check fails.
    """
    from ...anatomy import architecture_of, known_model_types, read_architecture
    from ...checkpoint import open_model
    from ...errors import WrongDescription
    from ...forward import check_architecture as check

    if description is None and model is None:
        entries = [(model_type, architecture_of(model_type).name) for model_type in known_model_types()]
        if as_json:
            click.echo(json.dumps([{"model_type": kind, "description": name} for kind, name in entries], indent=2))
            return
        grid = Table("model_type", "description")
        for entry in entries:
            grid.add_row(*entry)
        stdout.print(grid)
        return
    opened = None if model is None else open_model(model).model
    if description is None:
        assert opened is not None  # one of the two was given
        architecture = architecture_of(opened.config.model_type)
    elif description in known_model_types() and not Path(description).exists():
        architecture = replace(architecture_of(description), model_types=(description,))
    else:
        architecture = read_architecture(description)
    checks = check(architecture, opened)
    if as_json:
        click.echo(json.dumps([{**asdict(made), "passed": made.passed} for made in checks], indent=2))
    else:
        grid = Table("what must hold", "off by", "", "look at")
        for made in checks:
            number = "-" if made.error is None else f"{made.error:.1e}"
            verdict = "does not apply" if not made.applies else "holds" if made.passed else "FAILS"
            grid.add_row(made.what, number, verdict, "" if made.passed else ", ".join(made.keys))
        print_whole(grid)
    failed = [made for made in checks if not made.passed]
    if failed:
        raise WrongDescription(
            f"the architecture description {architecture.name!r} fails {len(failed)} of {len(checks)} checks: "
            + "; ".join(made.complaint for made in failed)
        )
