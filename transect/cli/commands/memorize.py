"""`transect memorize`: a memory of a corpus beside a trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..group import main_group
from ..options import Place, shared_options
from ..printing import checks_printed, print_whole, progress_bar


@main_group.command()
@click.argument("model")
@click.option("--data", required=True, help="The corpus; never the text that the result is evaluated on.")
@click.option("--out", type=Place(), required=True, help="Folder to write the model to.")
@click.option("--blocks", type=int, default=4, show_default=True, help="Of the memory's network.")
@click.option("--neighbours", type=int, default=64, show_default=True, help="Of a position, which are imitated.")
@click.option("--temperature", type=float, default=0.0, show_default=True,
              help="Weights are exp(-distance² / this); 0 takes it from the distances.")  # fmt: skip
@click.option("--imitation", type=float, default=0.5, show_default=True,
              help="Share of the loss that is the distance from them; the rest is the next token's.")  # fmt: skip
@click.option("--epochs", type=int, default=5, show_default=True, help="Passes over the positions.")
@click.option("--batch", type=int, default=512, show_default=True, help="Positions in a step.")
@click.option("--lr", type=float, default=1e-3, show_default=True, help="Largest learning rate.")
@click.option("--held-out", type=float, default=0.1, show_default=True,
              help="Share of the sequences, the last ones, that choose how much the memory counts.")  # fmt: skip
@click.option("--sequences", type=int, help="Use so many sequences, evenly spaced. Default: all.")
@shared_options("sequence_length", "special_tokens", "seed", "revision", "architecture", "dtype", "overwrite", "json")
def memorize(model: str, data: str, out: Path, as_json: bool, **options: Any) -> None:
    """Give MODEL a memory of a corpus, whose prediction is mixed into its own, and write it as a checkpoint.

    The model itself stays as it is. The checkpoint loads, generates and is evaluated like any other. The same command
    goes on from what an interrupted one has left.
    """
    from ...anatomy import record_of
    from ...checkpoint import check_output, open_model
    from ...store import alone
    from ...verbs import memorize as memorize_model

    check_output(out, options["overwrite"])
    loading = {name: options.pop(name) for name in ("revision", "dtype", "architecture")}
    says = checks_printed(as_json)
    with alone(out), progress_bar(as_json) as (_, show):
        opened = open_model(model, **loading)
        made = memorize_model(opened, data, out=out, progress=show, on_check=says, **options)
    outcome = record_of(made).history[-1]
    if as_json:
        click.echo(json.dumps({"out": str(out), **outcome}))
        return
    print_whole(
        f"{out}: held-out loss {outcome['loss_before']:.4f} -> {outcome['loss_after']:.4f} with a share of "
        f"{outcome['share']:.2f} for the memory"
    )
    print_whole(
        f"{outcome['memory_parameters']:,} numbers for {outcome['positions']:,} positions in {outcome['seconds']:.0f} s"
    )
