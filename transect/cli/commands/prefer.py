"""`transect prefer`: a reward model from preferences between answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..group import main_group
from ..options import Place, device_name, shared_options, split
from ..printing import checks_printed, print_whole, progress_bar


@main_group.command()
@click.argument("model")
@click.option("--data", required=True, help="Preferences, .json or .jsonl: prompt, better, worse; category, aspect.")
@click.option("--out", type=Place(), required=True, help="Folder for the reward model.")
@click.option("--eval", "eval_data", metavar="DATA", help="Preferences that nothing is trained on, to be judged by.")
@click.option("--categories", callback=split, metavar="NAME,...", help="Those that there must be. Default: the data's.")
@click.option("--aspects", callback=split, metavar="NAME,...",
              help="Those that every category must have. Default: its data's.")  # fmt: skip
@click.option("--rank", type=int, default=16, show_default=True, help="Of the LoRA of an aspect.")
@click.option("--alpha", type=float, default=16.0, show_default=True, help="LoRA's scale times the rank.")
@click.option("--dropout", type=float, default=0.05, show_default=True, help="LoRA's.")
@click.option("--roles", callback=split, default="q,v", show_default=True, metavar="q,k,...",
              help="Matrices that get LoRA: q, k, v, o, gate, up, down.")  # fmt: skip
@click.option("--base-share", type=float, default=0.6, show_default=True,
              help="Share of a category's prompts for its backbone; the rest is for joining its aspects.")  # fmt: skip
@click.option("--lr", type=float, default=1e-5, show_default=True, help="Largest learning rate of the backbones.")
@click.option("--aspect-lr", type=float, default=3e-4, show_default=True, help="Of the aspects.")
@click.option("--aggregator-lr", type=float, default=1e-3, show_default=True, help="Of what joins them.")
@click.option("--router-lr", type=float, default=1e-5, show_default=True, help="Of the router.")
@click.option("--epochs", type=int, default=1, show_default=True, help="Passes over the pairs, in each phase.")
@click.option("--steps", type=int, help="At most so many steps in each phase.")
@click.option("--held-out", type=float, default=0.1, show_default=True,
              help="Share of each phase's prompts that only chooses the best state.")  # fmt: skip
@click.option("--every", type=int, help="Steps between two measurements. Default: a tenth of all steps.")
@click.option(
    "--device", callback=device_name, help="Where to train. Default: a GPU if there is one (accelerate decides)."
)
@shared_options("sequence_length", "batch_size", "seed", "revision", "architecture", "dtype", "overwrite", "json")
def prefer(model: str, out: Path, as_json: bool, **options: Any) -> None:
    """Train a reward model from MODEL: a scorer for each category of prompts, and what chooses between them.

    The same command goes on from what an interrupted one has left. It also runs under `accelerate launch`.
    """
    from ...checkpoint import check_output, open_model
    from ...store import alone
    from ...training import Machine
    from ...verbs import prefer as prefer_model

    check_output(out, options["overwrite"])
    loading = {name: options.pop(name) for name in ("revision", "dtype", "architecture")}
    main = Machine(options["device"]).is_main
    says = checks_printed(as_json or not main)
    with alone(out), progress_bar(as_json or not main) as (_, show):
        reward = prefer_model(open_model(model, **loading), out=out, progress=show, on_check=says, **options)
    if not main:
        return
    if as_json:
        click.echo(json.dumps({"out": str(out), **reward.training}))
        return
    for name, phase in reward.training["phases"].items():
        print_whole(
            f"{name}: held-out loss {phase['loss_before']:.4f} -> {phase['loss_after']:.4f} (kept: {phase['kept']}), "
            f"{phase['trained']:,} numbers, {phase['steps']} steps in {phase['seconds']:.0f} s"
        )
    for name, share in reward.training.get("accuracy", {}).items():
        print_whole(f"the better answer gets more: {share:.1%} of the pairs ({name})")
    print_whole(f"{out}: a reward model of {len(reward.categories)} categories ({', '.join(reward.categories)})")
