"""`transect adapt`: fine-tuning by any published way of choosing what is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..group import main_group
from ..method_options import AdapterCommand, method_settings
from ..options import Place, device_name, shared_options, split
from ..printing import checks_printed, print_whole, progress_bar


@main_group.command(cls=AdapterCommand)
@click.argument("model")
@click.option("--method", required=True, help="What is trained; see the list below.")
@click.option("--data", required=True, help="Training data; never the text that the result is evaluated on.")
@click.option("--out", type=Place(), required=True, help="Folder for the adapter, or with --merge for the model.")
@click.option("--merge", is_flag=True, help="Write the adapter into the weights: the result is an ordinary model.")
@click.option("--eval", "eval_data", metavar="DATA", help="Text of the same kind, measured before and after.")
@click.option("--forgets", metavar="DATA", help="Text of another kind that must not be forgotten, measured likewise.")
@click.option("--eval-sequences", type=int, help="Use so many sequences of each of these two. Default: all.")
@click.option("--roles", callback=split, metavar="q,k,...",
              help="Only these matrices: q, k, v, o, gate, up, down. Default: every linear layer.")  # fmt: skip
@click.option("--objective", default="own", show_default=True, help="What is lowered; see the list below.")
@click.option("--optimizer", default="adamw", show_default=True, help="How steps are taken; see the list below.")
@click.option("--penalties", callback=split, help="Added to the loss, comma-separated; see the list below.")
@click.option("--layer-rates", help="By what each layer's learning rate is multiplied; see the list below.")
@click.option("--lr", type=float, help="Largest learning rate. Default: the method's.")
@click.option("--epochs", type=int, default=1, show_default=True, help="Passes over the training sequences.")
@click.option("--steps", type=int, help="At most so many optimizer steps.")
@click.option("--accumulate", type=int, default=1, show_default=True, help="Batches in a step.")
@click.option("--held-out", type=float, default=0.1, show_default=True,
              help="Share of the sequences, the last ones, that only choose the best state.")  # fmt: skip
@click.option("--every", type=int, help="Steps between two measurements. Default: a tenth of all steps.")
@click.option("--sequences", type=int, help="Use so many sequences, evenly spaced. Default: all.")
@click.option(
    "--device", callback=device_name, help="Where to train. Default: a GPU if there is one (accelerate decides)."
)
@shared_options(
    "sequence_length", "special_tokens", "batch_size", "seed", "revision", "architecture", "dtype", "overwrite", "json"
)
@click.pass_context
def adapt(context: click.Context, model: str, method: str, out: Path, as_json: bool, **options: Any) -> None:
    """Fine-tune MODEL, and say what was learned and what was forgotten.

    The same command goes on from what an interrupted one has left. It also runs under `accelerate launch`.
    """
    from ...adaptation import way_named
    from ...checkpoint import check_output, open_model
    from ...goals import objective_named
    from ...store import alone
    from ...training import Machine, layer_rates_named, optimizer_named, penalty_named
    from ...verbs import adapt as adapt_model

    way_named(method)
    score = objective_named(options["objective"]).score
    optimizer_named(options["optimizer"])
    options["penalties"] = options["penalties"] or []
    for name in options["penalties"]:
        penalty_named(name)
    if options["layer_rates"] is not None:
        layer_rates_named(options["layer_rates"])
    settings = method_settings(context.obj, method)
    check_output(out, options["overwrite"])
    revision, loading = options.pop("revision"), {name: options.pop(name) for name in ("dtype", "architecture")}
    main = Machine(options["device"]).is_main
    says = checks_printed(as_json or not main)
    with alone(out), progress_bar(as_json or not main) as (_, show):
        opened = open_model(model, revision=revision, **loading)
        adapted = adapt_model(opened, method, out=out, settings=settings, progress=show, on_check=says, **options)
    if not main:
        return
    outcome = adapted.outcome
    if as_json:
        click.echo(json.dumps({"out": str(out), **outcome}))
        return
    print_whole(
        f"{out}: held-out loss {outcome['loss_before']:.4f} -> {outcome['loss_after']:.4f} (kept: {outcome['kept']})"
    )
    for name, said in {"eval": "text of the same kind", "forgets": "text that must not be forgotten"}.items():
        if name in outcome["texts"]:
            loss = outcome["texts"][name]
            error = "" if loss["error"] is None else f" ± {loss['error']:.4f}"
            change = loss["after"] - loss["before"]
            first, last = loss["accuracy"]
            scored = f", {score} {first:.4f} -> {last:.4f}" if score else ""
            print_whole(f"{said}: {loss['before']:.4f} -> {loss['after']:.4f} ({change:+.4f}{error}){scored}")
    for words, number in outcome["told"].items():
        print_whole(f"{words}: {number:.4g}")
    print_whole(
        f"{outcome['trained']:,} numbers trained, {outcome['optimizer_bytes'] / 1e6:.2f} MB of the optimizer's, "
        f"{outcome['steps']} steps and {outcome['tokens']:,} tokens in {outcome['seconds']:.0f} s"
    )
