"""`transect convert`: a trained model into another architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..group import main_group
from ..method_options import ConversionCommand, method_settings
from ..options import Place, device_name, shared_options, whole_numbers
from ..printing import checks_printed, print_whole, progress_bar


@main_group.command(cls=ConversionCommand)
@click.argument("model")
@click.option("--method", required=True, help="See the list below.")
@click.option("--data", help="What is trained on, and looked at; never the text that it is judged by.")
@click.option("--out", type=Place(), required=True, help="Folder to write the model to.")
@click.option("--eval", "eval_data", metavar="DATA", help="Text to measure on: as it was, converted, and trained.")
@click.option("--eval-sequences", type=int, help="Use so many sequences of it. Default: all.")
@click.option("--steps", type=int, help="Of the training; 0 converts only. Default: one pass over the data.")
@click.option("--epochs", type=int, default=1, show_default=True, help="Passes over the training sequences.")
@click.option("--lr", type=float, help="Largest learning rate. Default: the method's.")
@click.option("--train", type=click.Choice(["full", "lora", "new"]),
              help="All of the blocks, low-rank updates, or what is new. Default: the method's.")  # fmt: skip
@click.option("--lowers", type=click.Choice(["own", "distill"]),
              help="Its own loss, or its distance from the model as it was. Default: the method's.")  # fmt: skip
@click.option("--accumulate", type=int, default=1, show_default=True, help="Batches in a step.")
@click.option("--held-out", type=float, default=0.1, show_default=True,
              help="Share of the sequences, the last ones, that only choose the best state.")  # fmt: skip
@click.option("--every", type=int, help="Steps between two measurements. Default: a tenth of all steps.")
@click.option("--sequences", type=int, help="Use so many sequences, evenly spaced. Default: all.")
@click.option("--lengths", callback=whole_numbers, metavar="N,N,...",
              help="Prompts at which speed, operations and cache are measured, before and after.")  # fmt: skip
@click.option(
    "--device", callback=device_name, help="Where to train. Default: a GPU if there is one (accelerate decides)."
)
@shared_options(
    "sequence_length", "special_tokens", "batch_size", "seed", "revision", "architecture", "dtype", "overwrite", "json"
)
@click.pass_context
def convert(context: click.Context, model: str, method: str, out: Path, as_json: bool, **options: Any) -> None:
    """Turn MODEL into another architecture that keeps its weights, and say what is left and what it costs.

    The same command goes on from what an interrupted one has left. It also runs under `accelerate launch`.
    """
    from ...checkpoint import check_output, open_model
    from ...checkpoint.modeling_file import loader_of
    from ...conversion import conversion_named
    from ...report.conversion import lines_of
    from ...store import alone
    from ...training import Machine
    from ...verbs import convert as convert_model

    chosen = conversion_named(method)
    settings = method_settings(context.obj, method)
    chosen.settings(settings.get(method, {}))
    options["lengths"] = options["lengths"] or ()
    check_output(out, options["overwrite"])
    revision, loading = options.pop("revision"), {name: options.pop(name) for name in ("dtype", "architecture")}
    main = Machine(options["device"]).is_main
    says = checks_printed(as_json or not main)
    with alone(out), progress_bar(as_json or not main) as (_, show):
        opened = open_model(model, revision=revision, **loading)
        converted = convert_model(opened, method, out=out, settings=settings, progress=show, on_check=says, **options)
    if not main:
        return
    if as_json:
        click.echo(json.dumps({"out": str(out), **converted.outcome}))
        return
    for line in lines_of(converted.outcome, str(out), loader_of(converted.model)):
        print_whole(line)
