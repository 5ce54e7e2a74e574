"""`transect race BASE --mixer ...`: a contest of parts in fresh models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from ..method_options import PartContestCommand, method_settings, refuse_unused
from ..options import Place, device_name, shared_options, shares, split, whole_numbers
from ..printing import print_whole, progress_bar

_SLOTS = ("mixer", "mlp", "activation", "matrix", "norm", "block")
SLOT_OPTIONS = tuple(f"--{slot}" for slot in _SLOTS)


def _lengths(context: click.Context, option: click.Parameter, value: str) -> list[int]:
    return [] if value == "none" else whole_numbers(context, option, value) or []


@click.command(cls=PartContestCommand)
@click.argument("base")
@click.option(
    "--mixer", callback=split, metavar="PART,...", help="In the place of attention; `base` is the model's own."
)
@click.option("--mlp", callback=split, metavar="PART,...", help="In the place of the MLP.")
@click.option("--activation", callback=split, metavar="PART,...", help="In the place of the MLP's activation.")
@click.option("--matrix", callback=split, metavar="PART,...", help="In the places of all matrices.")
@click.option("--norm", callback=split, metavar="PART,...", help="In the places of the norms.")
@click.option("--block", callback=split, metavar="PART,...", help="Around every block.")
@click.option("--task", required=True, help="What is learned; see the list below.")
@click.option("--data", help="Text to train on, of the task text.")
@click.option("--eval", "eval_data", metavar="DATA", help="Held-out text of the same kind.")
@click.option("--out", type=Place(), required=True, help="Run folder; a contest in it is continued.")
@click.option("--parameters", type=int, help="Every model has so many within 1 %. Default: as the first one.")
@click.option("--flops", type=int, help="Instead: every model takes so many operations for a sequence, within 1 %.")
@click.option("--hidden", type=int, default=64, show_default=True, help="Width of the stream.")
@click.option("--blocks", type=int, default=2, show_default=True, help="How many blocks.")
@click.option("--heads", type=int, default=4, show_default=True, help="Attention heads.")
@click.option("--neurons", type=int, help="Of the MLP, before it is fitted. Default: 4 x hidden.")
@click.option("--steps", type=int, default=500, show_default=True, help="Of training, each on new examples.")
@click.option("--rates", default="0.0003,0.001,0.003", show_default=True, callback=shares,
              help="Learning rates that are tried; comma-separated.")  # fmt: skip
@click.option("--seeds", type=int, default=3, show_default=True)
@click.option("--lengths", default="256,1024,4096,16384", show_default=True, callback=_lengths,
              help="Lengths at which speed and memory are measured; comma-separated, or none.")  # fmt: skip
@click.option("--held-out", type=int, default=512, show_default=True, help="Examples that judge.")
@click.option("--optimizer", default="adamw", show_default=True, help="How steps are taken.")
@click.option("--workers", type=int, default=1, show_default=True, help="Processes that train.")
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True)
@click.option("--batch-size", type=int, default=32, show_default=True)
@click.option("--device", callback=device_name, default="cpu", show_default=True)
@shared_options("seed", "overwrite", "json")
@click.pass_context
def race_parts(context: click.Context, base: str, out: Path, as_json: bool, **options: Any) -> None:
    """Train a small model of the kind BASE with every combination of parts, at equal size, on a task: who learns it?

    Parameters of parts and of the task are options, such as --recall.keys 16.
    """
    from ...contest.parts import PartsTrial
    from ...errors import TransectError
    from ...report.parts_contest import further_tables, parts_table
    from ...verbs import race_parts as race

    named = {slot: options[slot] for slot in _SLOTS if options[slot]}
    for slot in _SLOTS:
        options[slot] = options[slot] or ()
    settings = method_settings(context.obj, None)
    names = [name for parts in named.values() for name in parts]
    refuse_unused(settings, dict.fromkeys([*names, options["task"], options["optimizer"]]))
    entrants = 1
    for parts in named.values():
        entrants *= len(set(parts))
    with progress_bar(as_json) as (bar, _):
        task = bar.add_task("trainings", total=entrants * (len(options["rates"]) + options["seeds"] - 1))
        frame = race(
            base,
            out=out,
            settings=settings,
            on_trial=lambda trial: bar.advance(task, isinstance(trial, PartsTrial)),
            **options,
        )
    if as_json:
        if "crossover" in frame.columns:  # JSON has no infinity
            frame["crossover"] = frame["crossover"].astype(object).replace(math.inf, "never")
        click.echo(frame.to_json(orient="records"))
    else:
        print_whole(parts_table(frame, base))
        for more in further_tables(frame):
            print_whole(more)
        print_whole(f"run folder: {out}   plot: {out / 'contest.png'}")
    if frame.attrs["lost"]:
        raise TransectError(f"not run: {', '.join(frame.attrs['lost'])}; the same command tries again")
