"""`transect merge`: several trained models of one shape into one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..group import main_group
from ..method_options import MergeCommand, method_settings
from ..options import Place, shared_options
from ..printing import print_whole, progress_bar


@main_group.command(cls=MergeCommand)
@click.argument("models", nargs=-1, required=True, metavar="A B [C ...]")
@click.option("--method", required=True, help="See the list below.")
@click.option("--base", metavar="MODEL", help="What they were trained from, for the methods that need it.")
@click.option(
    "--curve", metavar="DATA", help="Held-out text, on which they and the line between the first two are measured."
)
@click.option("--points", type=int, default=11, show_default=True, help="Of that line.")
@click.option("--sequences", type=int, help="Use so many sequences of the text. Default: all.")
@click.option("--out", type=Place(), required=True, help="Folder to write the model to.")
@shared_options(
    "sequence_length", "special_tokens", "batch_size", "seed", "revision", "architecture", "dtype", "device",
    "overwrite", "json",
)  # fmt: skip
@click.pass_context
def merge(
    context: click.Context, models: tuple[str, ...], method: str, base: str | None, out: Path, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Merge trained models of one shape, A B and perhaps more, into one.

    Models from different seeds are aligned first (weight-matching). Models that do not fit are refused, by the name of
    the tensor.
    """
    from ...checkpoint import check_output, open_model
    from ...errors import TransectError
    from ...merging import merging_named
    from ...report.merging import lines_of
    from ...store import alone
    from ...verbs import merge as merge_them
    from ..options import opening

    chosen = merging_named(method)
    settings = method_settings(context.obj, method)
    chosen.settings(settings.get(method, {}))
    if len(models) < 2:
        raise TransectError("merging takes two models or more: name them behind one another")
    if chosen.needs_base and base is None:
        raise TransectError(f"{method} needs the model that the others were trained from: --base MODEL")
    check_output(out, options["overwrite"])
    loading = opening(options)
    with alone(out), progress_bar(as_json) as (_, show):
        opened = [open_model(one, **loading) for one in models]
        start = None if base is None else open_model(base, **loading)
        merged = merge_them(opened, method, base=start, out=out, settings=settings, progress=show, **options)
    if as_json:
        click.echo(json.dumps({"out": str(out), **merged.outcome}))
        return
    for line in lines_of(merged.outcome, str(out)):
        print_whole(line)
