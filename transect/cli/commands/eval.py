"""`transect eval`: what a model does on held-out data, and what it costs."""

from __future__ import annotations

import json
from typing import Any

import click

from ..group import main_group
from ..options import LOADING, opening, shared_options, whole_numbers
from ..printing import print_whole


@main_group.command("eval")
@click.argument("model")
@click.option("--data", required=True, help="Held-out data.")
@click.option("--sequences", type=int, help="Use so many sequences, evenly spaced. Default: all.")
@click.option("--behind", callback=whole_numbers, metavar="N,N,...",
              help="Say each fact otherwise in a note, so many tokens of the data before it is asked.")  # fmt: skip
@shared_options("facts", "passages", "sequence_length", "special_tokens", "batch_size", "seed", *LOADING, "json")
def evaluate(model: str, data: str, as_json: bool, **options: Any) -> None:
    """Loss, perplexity, accuracy, speed, memory and size of MODEL, and how much it knows of facts and passages."""
    import pandas as pd

    from ...checkpoint import open_model
    from ...report import rich_table
    from ...verbs import evaluate as evaluate_model

    options["behind"] = options["behind"] or ()
    opened = open_model(model, **opening(options))
    result = evaluate_model(opened, data, **options)
    if as_json:
        click.echo(json.dumps(result))
    else:
        print_whole(rich_table(pd.DataFrame([result]), f"{model}, {result['tokens']:,} predictions"))
        for name in ("facts", "passages"):
            if f"{name}_asked" in result:
                print_whole(f"{name} known: {result[f'{name}_known']:,} of {result[f'{name}_asked']:,}")
        for distance in options["behind"]:
            said = f"{result[f'facts_recalled_{distance}']:,} of {result['facts_asked']:,}"
            print_whole(f"facts said as a note {distance:,} tokens earlier says: {said}")
