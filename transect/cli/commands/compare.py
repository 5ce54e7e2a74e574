"""`transect compare`: methods and budgets side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ..group import main_group
from ..method_options import MethodCommand, method_settings, refuse_unused
from ..options import LOADING, Place, opening, shared_options, shares, split, whole_numbers
from ..printing import print_whole, progress_bar


@main_group.command(cls=MethodCommand)
@click.argument("model")
@click.option("--methods", required=True, callback=split, help="Comma-separated; see the list below.")
@click.option("--keep", required=True, callback=shares, help="Comma-separated shares of bytes, in (0, 1].")
@click.option("--data", help="Calibration data.", required=True)
@click.option("--eval", "eval_data", help="Held-out data.", required=True)
@click.option("--also", multiple=True, metavar="DATA",
              help="Further held-out data, of another kind, to judge rows on; may be repeated.")  # fmt: skip
@click.option("--beside", callback=split, metavar="FOLDER,...",
              help="Finished models, judged on the same texts in rows of their own.")  # fmt: skip
@click.option("--lengths", callback=whole_numbers, metavar="N,N,...",
              help="Prompts at which each row's speed, operations and cache are measured, too.")  # fmt: skip
@click.option("--out", type=Place(), required=True, help="Run folder; a run in it is continued.")
@click.option("--allocation", "allocations", callback=split,
              help="Comma-separated. Default: each method's own, mostly uniform.")  # fmt: skip
@click.option("--eval-sequences", type=int, help="Use so many held-out sequences, evenly spaced. Default: all.")
@click.option("--workers", type=int, default=1, show_default=True, help="Processes that compute rows.")
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True)
@click.option("--facts", metavar="FILE",
              help="Adds the share of the facts that each row still knows: .json, .jsonl or `common`.")  # fmt: skip
@click.option("--stream", is_flag=True, help="One block in memory at a time; what is known of each lies on disk.")
@click.option("--dry-run", is_flag=True, help="Only say what memory, disk and time it will take; measures one block.")
@shared_options("sequential", "refit", "roles", "sequence_length", "sequences", "batch_size", "fisher", "accumulate",
                "special_tokens", "seed", *LOADING, "overwrite", "json")  # fmt: skip
@click.pass_context
def compare(context: click.Context, model: str, out: Path, as_json: bool, **options: Any) -> None:
    """Compress MODEL by every method to every budget, evaluate each, and write a table and a Pareto plot."""
    import torch

    from ...checkpoint import open_model
    from ...compression import allocation_named, method
    from ...errors import TransectError
    from ...report import rich_lengths, rich_table
    from ...store import alone
    from ...verbs import compare as compare_models

    settings = method_settings(context.obj, None)
    for name in options["methods"]:
        method(name)
    allocations = options["allocations"] or [method(name).allocation for name in options["methods"]]
    for name in allocations:
        allocation_named(name)
    refuse_unused(settings, dict.fromkeys([*options["methods"], *allocations]))
    options["also"] = _named(options["also"])
    options["beside"], options["lengths"] = options["beside"] or (), options["lengths"] or ()
    loading = opening(options)
    options["accumulate"] = getattr(torch, options["accumulate"])
    rows = (
        1
        + len(options["beside"])
        + len(options["methods"]) * len(options["allocations"] or [""]) * len(options["keep"])
    )
    with nullcontext() if options["dry_run"] else alone(out), progress_bar(as_json) as (bar, show):
        opened, loading = (model, loading) if options["stream"] else (open_model(model, **loading), {})
        task = bar.add_task("rows", total=rows)
        frame = compare_models(
            opened, data=options.pop("data"), eval_data=options.pop("eval_data"), out=out, settings=settings,
            progress=show, on_row=lambda row: bar.advance(task), **loading, **options,
        )  # fmt: skip
    if options["dry_run"]:
        return click.echo(json.dumps(asdict(frame))) if as_json else print_whole(f"{model}: {frame}")
    if as_json:
        click.echo(frame.to_json(orient="records"))
    else:
        print_whole(rich_table(frame, f"{model}, {int(frame['tokens'].iloc[0]):,} held-out predictions"))
        if options["lengths"]:
            print_whole(rich_lengths(frame))
        print_whole(f"run folder: {out}   plot: {out / 'pareto.png'}")
    if frame.attrs["lost"]:
        raise TransectError(f"not computed: {', '.join(frame.attrs['lost'])}; the same command tries again")


def _named(texts: Sequence[str]) -> dict[str, str]:
    """By the shortest name that tells them apart: file names without their ending, or what was given."""
    short = [Path(text).stem for text in texts]
    return dict(zip(short if len(set(short)) == len(short) else texts, texts, strict=True))
