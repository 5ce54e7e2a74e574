"""`transect eval`: what a model does on held-out data, and what it costs."""

from __future__ import annotations

import json
from typing import Any

import click

from ..group import main_group
from ..options import LOADING, opening, shared_options
from ..printing import print_whole


@main_group.command("eval")
@click.argument("model")
@click.option("--data", required=True, help="Held-out data.")
@click.option("--sequences", type=int, help="Use so many sequences, evenly spaced. Default: all.")
@shared_options("facts", "passages", "sequence_length", "special_tokens", "batch_size", "seed", *LOADING, "json")
def evaluate(model: str, data: str, as_json: bool, **options: Any) -> None:
    """Loss, perplexity, accuracy, speed, memory and size of MODEL, and how much it knows of facts and passages."""
    import pandas as pd

    from ...checkpoint import open_model
    from ...report import rich_table
    from ...verbs import evaluate as evaluate_model

    opened = open_model(model, **opening(options))
    result = evaluate_model(opened, data, **options)
    if as_json:
        click.echo(json.dumps(result))
    else:
        print_whole(rich_table(pd.DataFrame([result]), f"{model}, {result['tokens']:,} predictions"))
        for name in ("facts", "passages"):
            if f"{name}_asked" in result:
                print_whole(f"{name} known: {result[f'{name}_known']:,} of {result[f'{name}_asked']:,}")
