"""`transect compress`: one method, one budget, one checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..group import main_group
from ..method_options import MethodCommand, method_settings, refuse_unused
from ..options import LOADING, Place, opening, shared_options
from ..printing import print_whole, progress_bar


@main_group.command(cls=MethodCommand)
@click.argument("model")
@click.option("--method", required=True, help="See the list below.")
@click.option("--keep", type=float, required=True, help="Share of the matrices' bytes to keep, in (0, 1].")
@click.option("--data", help="Calibration data.")
@click.option("--out", type=Place(), required=True, help="Folder to write the model to.")
@click.option(
    "--allocation", help="How bytes are shared among the matrices. Default: the method's own, mostly uniform."
)
@click.option("--stream", is_flag=True, help="One block in memory at a time, straight from and to safetensors.")
@click.option("--cache", type=Place(), help="File to keep the statistics in.")
@shared_options("sequential", "refit", "roles", "sequence_length", "sequences", "batch_size", "fisher", "accumulate",
                "special_tokens", "seed", *LOADING, "overwrite", "json")  # fmt: skip
@click.pass_context
def compress(context: click.Context, model: str, out: Path, stream: bool, as_json: bool, **options: Any) -> None:
    """Compress MODEL by one method and write it as a checkpoint."""
    import torch

    from ...anatomy import record_of
    from ...checkpoint import check_output, open_model, save
    from ...compression import allocation_named, method
    from ...store import alone
    from ...verbs import compress as compress_model

    settings = method_settings(context.obj, options["method"])
    chosen = method(options["method"])
    sharing = allocation_named(options["allocation"] or chosen.allocation)
    refuse_unused(settings, (chosen.name, sharing.name))
    for one in (chosen, sharing):
        one.settings(settings.get(one.name, {}))
    overwrite = options.pop("overwrite")
    loading = opening(options)
    options["accumulate"] = getattr(torch, options["accumulate"])
    check_output(out, overwrite)
    with alone(out), progress_bar(as_json) as (_, show):
        if stream:
            for name in ("refit", "cache", "roles"):
                if options.pop(name):
                    raise click.UsageError(f"--{name} cannot be combined with --stream")
            outcome = compress_model(
                model, stream_to=out, overwrite=overwrite, settings=settings, progress=show, **loading, **options
            )
        else:
            opened = open_model(model, **loading)
            compressed = compress_model(opened, settings=settings, progress=show, **options)
            save(compressed, out, opened.tokenizer or opened.processor, overwrite=overwrite)
            outcome = record_of(compressed).history[-1]
    outcome = {"out": str(out), **{key: outcome[key] for key in ("kept", "matrix_bytes", "dense_matrix_bytes")}}
    if as_json:
        click.echo(json.dumps(outcome))
    else:
        print_whole(f"{out}: kept {outcome['kept']:.1%} of {outcome['dense_matrix_bytes']:,} bytes of matrices")
