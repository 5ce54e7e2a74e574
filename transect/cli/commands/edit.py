"""`transect edit`: a change of what a model knows or does, with the way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..group import main_group
from ..method_options import EditCommand, method_settings, refuse_unused
from ..options import LOADING, Place, opening, shared_options
from ..printing import print_whole, progress_bar, stdout


@main_group.command(cls=EditCommand)
@click.argument("model")
@click.option("--method", help="See the list below.")
@click.option("--edits", "facts", metavar="FILE", help="Facts to rewrite: .json, .jsonl or `common`.")
@click.option("--data", help="Text for statistics. Default with the bundled model: organism:calibration.")
@click.option("--eval", "eval_data", help="Held-out text for the general loss on the card.")
@click.option("--eval-sequences", type=int, default=64, show_default=True, help="Held-out sequences.")
@click.option("--out", type=Place(), help="Folder to write the model to.")
@click.option("--name", default="", help="What to call the edit. Default: the method's name with a number.")
@click.option("--list", "list_edits", is_flag=True, help="Show the edits that the folder MODEL holds, oldest first.")
@click.option(
    "--undo",
    is_flag=False,
    flag_value="",
    metavar="[NAME]",
    help="Take an edit out of the folder MODEL (into --out, or there): the newest, or the one of this name.",
)
@click.option("--dependents", is_flag=True, help="With --undo, also take out later edits that depend on that one.")
@shared_options("choices", "passages", "sequence_length", "special_tokens", "sequences", "batch_size", "seed", *LOADING,
                "overwrite", "json")  # fmt: skip
@click.pass_context
def edit(
    context: click.Context, model: str, method: str | None, out: Path | None, list_edits: bool, undo: str | None,
    dependents: bool, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Edit MODEL in closed form or nearly so, show what changed, and write it as an ordinary checkpoint."""
    from ...checkpoint import check_output, open_model
    from ...editing import edit as edit_named
    from ...editing import listed, read_stack, undo_folder
    from ...store import alone
    from ...verbs import edit as edit_model

    overwrite = options.pop("overwrite")
    if (undo is not None) + list_edits + (method is not None) > 1:
        raise click.UsageError("--method, --list and --undo do not go together")
    if dependents and undo is None:
        raise click.UsageError("--dependents goes with --undo")
    if list_edits:
        stack = read_stack(model)
        if as_json:
            click.echo(json.dumps([entry.described() for entry in stack]))
        else:
            print_whole(listed(stack))
        return
    if undo is not None:
        place = undo_folder(model, out, name=undo, dependents=dependents, overwrite=overwrite)
        print_whole(f"{place}: {undo or 'the newest edit'} is taken out")
        return
    if method is None or out is None:
        raise click.UsageError("--method and --out are needed (or --list, or --undo)")
    settings = method_settings(context.obj, method)
    chosen = edit_named(method)
    refuse_unused(settings, (method,))
    chosen.settings(settings.get(method, {}))
    check_output(out, overwrite)
    with alone(out), progress_bar(as_json) as (_, show):
        opened = open_model(model, **opening(options))
        edited = edit_model(
            opened, method, out=out, overwrite=overwrite, settings=settings, progress=show, **options
        )  # fmt: skip
    if as_json:
        click.echo(edited.card.to_json())
        return
    stdout.print(edited.card.tables())
    print_whole(f"{out}: an ordinary checkpoint; `transect edit {out} --undo {edited.entry.name}` takes the edit out")
