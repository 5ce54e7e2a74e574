"""`transect claims`: what papers say, measured."""

from __future__ import annotations

import json
from typing import Any

import click

from ..group import main_group
from ..options import LOADING, Place, shared_options, shares
from ..printing import progress_bar, stdout


@main_group.command("claims")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--model", default="organism", show_default=True, metavar="MODEL")
@click.option("--data", help="Calibration data. Default with the bundled model: organism:calibration.")
@click.option("--eval", "eval_data", help="Held-out data. Default with the bundled model: organism:heldout.")
@click.option("--eval-sequences", type=int, default=128, show_default=True,
              help="Held-out sequences, spread evenly over the data.")  # fmt: skip
@click.option("--keep", callback=shares,
              help="Shares of bytes at which compressed models are compared. Default: each claim's own.")  # fmt: skip
@click.option("--record", type=Place(), help="Folder to write each verdict to; the claims in it are not run again.")
@shared_options("facts", "choices", "passages", "sequence_length", "special_tokens", "sequences", "batch_size", "seed",
                *LOADING, "json")  # fmt: skip
def check_claims(
    names: tuple[str, ...], model: str, data: str | None, eval_data: str | None, as_json: bool, **options: Any
) -> None:
    """Check what papers claim of their methods on MODEL (in float32); each NAME is a claim or a method."""
    from ...claims import Verdict
    from ...claims.show import rich_outcome
    from ...errors import TransectError
    from ...verbs import check_claims as check

    options["dtype"], options["keep"] = options["dtype"] or "float32", options["keep"] or None
    with progress_bar(as_json) as (_, show):
        outcomes = check(names, model, data, eval_data, progress=show, **options)
    if as_json:
        click.echo(json.dumps([outcome.to_dict() for outcome in outcomes], indent=2))
    else:
        for outcome in outcomes:
            stdout.print(rich_outcome(outcome), crop=False)
        verdicts = [str(outcome.result.verdict) for outcome in outcomes]
        stdout.print(", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts)))
    failed = [outcome.claim.name for outcome in outcomes if outcome.result.verdict == Verdict.FAILED]
    if failed:
        raise TransectError(f"{', '.join(failed)} failed; what went wrong stands above")
