"""`transect edit`: a change of what a model knows or does, with the way back."""

from __future__ import annotations

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
@click.option(
    "--undo", is_flag=True, help="Take back the edit in the folder MODEL, bit for bit (into --out, or there)."
)
@shared_options("choices", "passages", "sequence_length", "special_tokens", "sequences", "batch_size", "seed", *LOADING,
                "overwrite", "json")  # fmt: skip
@click.pass_context
def edit(
    context: click.Context, model: str, method: str | None, out: Path | None, undo: bool, as_json: bool, **options: Any
) -> None:
    """Edit MODEL in closed form or nearly so, show what changed, and write it as an ordinary checkpoint."""
    from ...checkpoint import check_output, open_model
    from ...editing import edit as edit_named
    from ...editing import undo_folder
    from ...store import alone
    from ...verbs import edit as edit_model

    overwrite = options.pop("overwrite")
    if undo:
        if method is not None:
            raise click.UsageError("--undo takes back what is there; it goes without --method")
        print_whole(f"{undo_folder(model, out, overwrite=overwrite)}: the edit is taken back")
        return
    if method is None or out is None:
        raise click.UsageError("--method and --out are needed (or --undo)")
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
    print_whole(f"{out}: an ordinary checkpoint; `transect edit {out} --undo` takes the edit back")
