"""`transect race`: trainings side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..group import main_group
from ..method_options import AdapterCommand, method_settings, refuse_unused
from ..options import LOADING, Place, opening, shared_options, shares, split
from ..printing import print_whole, progress_bar
from .race_parts import SLOT_OPTIONS, race_parts


def _factors(context: click.Context, option: click.Parameter, value: str) -> list[float]:
    try:
        return [float(one) for one in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} should be numbers, separated by commas") from None


class RaceCommand(AdapterCommand):
    """Of adapters; where parts are named for a slot, of these."""

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **more: Any) -> click.Context:
        """The context of the command that the options belong to."""
        if any(word.partition("=")[0] in SLOT_OPTIONS for word in args):
            return race_parts.make_context(info_name, args, *rest, **more)
        return super().make_context(info_name, args, *rest, **more)


@main_group.command(cls=RaceCommand)
@click.argument("model")
@click.option("--adapt", "adapters", required=True, callback=split, help="Comma-separated; see the list below.")
@click.option("--data", required=True, help="Training data; never the text that the table judges by.")
@click.option("--eval", "eval_data", required=True, help="Held-out data of the same kind.")
@click.option("--forgets", metavar="DATA", help="Text of another kind that must not be forgotten.")
@click.option("--out", type=Place(), required=True, help="Run folder; a contest in it is continued.")
@click.option("--shares", default="0.005", show_default=True, callback=shares,
              help="Trained numbers, as shares of those in the adapted matrices; comma-separated.")  # fmt: skip
@click.option("--rates", default="0.3,1,3", show_default=True, callback=_factors,
              help="Learning rates that are tried, as factors of each method's own.")  # fmt: skip
@click.option("--seeds", type=int, default=3, show_default=True)
@click.option("--eval-sequences", type=int, help="Use so many sequences of each text. Default: all.")
@click.option("--roles", callback=split, metavar="q,k,...",
              help="Only these matrices: q, k, v, o, gate, up, down. Default: every linear layer.")  # fmt: skip
@click.option("--optimizer", default="adamw", show_default=True, help="How steps are taken; see the list below.")
@click.option("--penalties", callback=split, help="Added to the loss of each, comma-separated; see the list below.")
@click.option("--layer-rates", help="By what each layer's learning rate is multiplied; see the list below.")
@click.option("--epochs", type=int, default=1, show_default=True, help="Passes over the training sequences.")
@click.option("--steps", type=int, help="At most so many optimizer steps.")
@click.option("--accumulate", type=int, default=1, show_default=True, help="Batches in a step.")
@click.option("--held-out", type=float, default=0.1, show_default=True,
              help="Share of the sequences, the last ones, that choose state and rate.")  # fmt: skip
@click.option("--every", type=int, help="Steps between two measurements. Default: a tenth of all steps.")
@click.option("--sequences", type=int, help="Use so many training sequences, evenly spaced. Default: all.")
@click.option("--workers", type=int, default=1, show_default=True, help="Processes that train.")
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True)
@shared_options("sequence_length", "special_tokens", "batch_size", "seed", *LOADING, "overwrite", "json")
@click.pass_context
def race(context: click.Context, model: str, out: Path, as_json: bool, **options: Any) -> None:
    """Fine-tune MODEL by every adapter, and say who learns and who forgets: a table and a plot.

    With --mixer, --mlp, --activation or --norm, a contest of these parts in fresh models: see
    `transect race llama --mixer softmax --help`.
    """
    from ...adaptation import way_named
    from ...errors import TransectError
    from ...report.contest import contest_table
    from ...verbs import race as race_adapters

    settings = method_settings(context.obj, None)
    options["penalties"] = options["penalties"] or []
    for name in options["adapters"]:
        way_named(name)
    chosen = [
        *options["adapters"],
        options["optimizer"],
        *options["penalties"],
        *filter(None, [options["layer_rates"]]),
    ]
    refuse_unused(settings, dict.fromkeys(chosen))
    loading = opening(options)
    sized = [name for name in options["adapters"] if way_named(name).size]
    entrants = len(sized) * len(options["shares"]) + len(options["adapters"]) - len(sized)
    with progress_bar(as_json) as (bar, _):
        task = bar.add_task("trainings", total=1 + entrants * (len(options["rates"]) + options["seeds"] - 1))
        frame = race_adapters(
            model, out=out, settings=settings, on_trial=lambda trial: bar.advance(task), **loading, **options
        )  # fmt: skip
    if as_json:
        click.echo(frame.to_json(orient="records"))
    else:
        print_whole(contest_table(frame, model))
        print_whole(f"run folder: {out}   plot: {out / 'contest.png'}")
    if frame.attrs["lost"]:
        raise TransectError(f"not run: {', '.join(frame.attrs['lost'])}; the same command tries again")
