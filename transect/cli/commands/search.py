"""`transect search`: a model's sizes, chosen inside the model itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..group import main_group
from ..method_options import SearchCommand, method_settings
from ..options import Place, device_name, shared_options, whole_numbers
from ..printing import checks_printed, print_whole, progress_bar


@main_group.command(cls=SearchCommand)
@click.argument("model")
@click.option("--method", default="tanglenas", show_default=True, help="How to search; see the list below.")
@click.option("--data", required=True, help="Text to search on; never the text that the result is evaluated on.")
@click.option("--out", type=Place(), required=True, help="Folder for the smaller model.")
@click.option("--keep", type=float, help="At most this share of the numbers in the matrices.")
@click.option("--penalty", type=float, default=1.0, show_default=True,
              help="Nats that the whole model's numbers cost; with --keep only those above it.")  # fmt: skip
@click.option("--neurons", callback=whole_numbers, metavar="N,N,...", help="Sizes of an MLP to choose from.")
@click.option("--heads", callback=whole_numbers, metavar="N,N,...", help="Numbers of key/value heads to choose from.")
@click.option("--depth", callback=whole_numbers, metavar="N,N,...", help="Numbers of blocks, from the first.")
@click.option("--hidden", callback=whole_numbers, metavar="N,N,...",
              help="Widths of the stream. Default of all four: quarters of the neurons and heads.")  # fmt: skip
@click.option("--shared", is_flag=True, help="One number of neurons and of heads for all blocks.")
@click.option("--lr", type=float, default=1e-4, show_default=True, help="Of the shared weights; 0 leaves them.")
@click.option("--epochs", type=int, default=1, show_default=True, help="Passes over the training sequences.")
@click.option("--steps", type=int, help="At most so many optimizer steps.")
@click.option("--validation", type=float, default=0.5, show_default=True,
              help="Share of the other sequences that only choose sizes.")  # fmt: skip
@click.option("--held-out", type=float, default=0.1, show_default=True,
              help="Share of the sequences, the last ones, that only judge.")  # fmt: skip
@click.option("--every", type=int, help="Steps between two states. Default: a tenth of all steps.")
@click.option("--sequences", type=int, help="Use so many sequences, evenly spaced. Default: all.")
@click.option(
    "--device", callback=device_name, help="Where to work. Default: a GPU if there is one (accelerate decides)."
)
@shared_options(
    "sequence_length", "special_tokens", "batch_size", "seed", "revision", "architecture", "dtype", "overwrite", "json"
)
@click.pass_context
def search(context: click.Context, model: str, method: str, out: Path, as_json: bool, **options: Any) -> None:
    """Choose the sizes of a smaller model inside MODEL, and cut it out.

    The same command goes on from what an interrupted one has left. The result has the slices as its weights: `transect
    recover` or `transect adapt` trains it further.
    """
    from ...checkpoint import check_output, open_model
    from ...sizing import searcher
    from ...store import alone
    from ...training import Machine
    from ...verbs import search as search_model

    searcher(method)
    settings = method_settings(context.obj, method)
    check_output(out, options["overwrite"])
    revision, loading = options.pop("revision"), {name: options.pop(name) for name in ("dtype", "architecture")}
    data = options.pop("data")
    main = Machine(options["device"]).is_main
    says = checks_printed(as_json or not main)
    with alone(out), progress_bar(as_json or not main) as (_, show):
        opened = open_model(model, revision=revision, **loading)
        found = search_model(opened, data, method, out=out, settings=settings, progress=show, on_check=says, **options)
    if not main:
        return
    outcome = found.outcome
    if as_json:
        click.echo(json.dumps({"out": str(out), **outcome}))
        return
    for name, size in outcome["sizes"].items():
        weights = ", ".join(f"{choice}: {weight:.2f}" for choice, weight in outcome["weights"].get(name, {}).items())
        print_whole(f"{name}: {size}" + (f"   ({weights})" if weights else ""))
    was, now = outcome["numbers"]
    print_whole(
        f"{out}: {now:,} of {was:,} numbers in the matrices ({outcome['kept']:.3f}), held-out loss "
        f"{outcome['loss_before']:.4f} -> {outcome['loss_after']:.4f}, as cut"
    )
