"""`transect recover`: a short training after any compression."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..group import main_group
from ..options import Place, device_name, shared_options
from ..printing import checks_printed, print_whole, progress_bar


@main_group.command()
@click.argument("model")
@click.option("--data", required=True, help="Training data; never the text that the result is evaluated on.")
@click.option("--out", type=Place(), required=True, help="Folder to write the model to.")
@click.option("--how", type=click.Choice(["lora", "full", "distill", "blocks"]), default="lora", show_default=True,
              help="Lower the model's own loss, or follow the teacher's logits or its blocks.")  # fmt: skip
@click.option("--teacher", help="The dense model, for distill and blocks.")
@click.option("--train", type=click.Choice(["lora", "full"]),
              help="What distill and blocks change: low-rank updates, or all. Default: full.")  # fmt: skip
@click.option("--lr", type=float, help="Largest learning rate. Default: 3e-4 for LoRA, else 1e-4.")
@click.option("--epochs", type=int, default=1, show_default=True, help="Passes over the training sequences.")
@click.option("--steps", type=int, help="At most so many optimiser steps (in `blocks`: for each block).")
@click.option("--accumulate", type=int, default=1, show_default=True, help="Batches in a step.")
@click.option("--rank", type=int, default=8, show_default=True, help="Of LoRA.")
@click.option("--alpha", type=float, default=16.0, show_default=True, help="Of LoRA.")
@click.option("--dropout", type=float, default=0.05, show_default=True, help="Of LoRA.")
@click.option("--temperature", type=float, default=1.0, show_default=True, help="Of the logits in `distill`.")
@click.option("--held-out", type=float, default=0.1, show_default=True,
              help="Share of the sequences, the last ones, that judge the repair and are not trained on.")  # fmt: skip
@click.option("--every", type=int, help="Steps between two measurements. Default: a tenth of all steps.")
@click.option("--sequences", type=int, help="Use so many sequences, evenly spaced. Default: all.")
@click.option(
    "--device", callback=device_name, help="Where to train. Default: a GPU if there is one (accelerate decides)."
)
@shared_options(
    "sequence_length", "special_tokens", "batch_size", "seed", "revision", "architecture", "dtype", "overwrite", "json"
)
def recover(model: str, data: str, out: Path, teacher: str | None, as_json: bool, **options: Any) -> None:
    """Repair MODEL by a short training after any compression, and write it as a checkpoint.

    The same command goes on from what an interrupted one has left. It also runs under `accelerate launch`.
    """
    from ...anatomy import record_of
    from ...checkpoint import check_output, open_model
    from ...recovery import Machine
    from ...store import alone
    from ...verbs import recover as recover_model

    check_output(out, options["overwrite"])
    revision, loading = options.pop("revision"), {name: options.pop(name) for name in ("dtype", "architecture")}
    main = Machine(options["device"]).is_main

    says = checks_printed(as_json or not main)
    with alone(out), progress_bar(as_json or not main) as (_, show):
        opened = open_model(model, revision=revision, **loading)
        dense = None if teacher is None else open_model(teacher, **loading)
        recovered = recover_model(
            opened, data, teacher=dense, out=out, progress=show, on_check=says, **options
        )  # fmt: skip
    if not main:
        return
    outcome = record_of(recovered).history[-1]
    if as_json:
        click.echo(json.dumps({"out": str(out), **outcome}))
        return
    print_whole(
        f"{out}: held-out loss {outcome['loss_before']:.4f} -> {outcome['loss_after']:.4f} (kept: {outcome['kept']})"
    )
    print_whole(
        f"it took {outcome['seconds']:.0f} s, {outcome['steps']} steps and {outcome['tokens']:,} tokens, and trained "
        f"{outcome['trained_parameters']:,} numbers"
    )
