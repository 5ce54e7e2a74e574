"""`transect build`: a fresh model with published parts in its slots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..group import main_group
from ..method_options import PartCommand, method_settings, refuse_unused
from ..options import Place, shared_options
from ..printing import print_whole

_SLOTS = ("mixer", "mlp", "activation", "matrix", "norm", "block")


@main_group.command(cls=PartCommand)
@click.argument("base")
@click.option("--out", type=Place(), required=True, help="Folder for the model.")
@click.option("--hidden", type=int, help="Width of the stream; needed, with --blocks, where BASE is no file.")
@click.option("--blocks", type=int, help="How many blocks.")
@click.option("--heads", type=int, help="Attention heads. Default: as wide as the config's.")
@click.option("--key-value-heads", type=int, help="Heads of keys and values. Default: as many as there are heads.")
@click.option("--head-size", type=int, help="Numbers in a head. Default: hidden / heads.")
@click.option("--neurons", type=int, help="Hidden units of the MLP. Default: as many to a channel as the config has.")
@click.option("--vocabulary", type=int, help="Tokens. Default: the tokenizer's, if one is named.")
@click.option("--length", type=int, help="The most positions.")
@click.option("--mixer", metavar="PART", help="Stands in the place of attention; see the list below.")
@click.option("--mlp", metavar="PART", help="Stands in the place of the MLP.")
@click.option("--activation", metavar="PART", help="Stands in the place of the MLP's activation.")
@click.option("--matrix", metavar="PART", help="Stands in the places of the matrices, all or those of --roles.")
@click.option("--norm", metavar="PART", help="Stands in the places of the norms.")
@click.option("--block", metavar="PART", help="Stands around every block.")
@click.option("--tokenizer", metavar="MODEL", help="Take the tokenizer of this model along.")
@shared_options("roles", "seed", "overwrite", "json")
@click.pass_context
def build(context: click.Context, base: str, out: Path, as_json: bool, **options: Any) -> None:
    """Make a model with random weights of the kind BASE: llama, gpt2, bert, vit, or a config.json.

    The result is an ordinary checkpoint, which every other command takes.
    """
    from ...evaluation import parameters
    from ...verbs import build as build_one

    used = [options[slot] for slot in _SLOTS if options[slot]]
    settings = method_settings(context.obj, used[0] if len(used) == 1 else None)
    refuse_unused(settings, used)
    model = build_one(base, out=out, settings=settings, **options)
    count = parameters(model)
    if as_json:
        click.echo(json.dumps({"out": str(out), "parameters": count, "model": type(model).__name__}))
        return
    parts = ", ".join(f"{slot} {options[slot]}" for slot in _SLOTS if options[slot]) or "no parts"
    print_whole(f"{out}: {type(model).__name__} with {parts}, {count:,} numbers")
