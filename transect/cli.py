"""The command line: parses, calls the Python API, prints."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# Without markup: an error or a name may hold square brackets.
stderr = Console(stderr=True, markup=False, highlight=False)
stdout = Console(markup=False)


class MethodCommand(click.Command):
    """A command that takes methods' parameters as options, wherever they stand, and lists them in its help."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Options that are none of the command's own go to `ctx.obj`, with their values, as (option, value)."""
        own = {name: option for option in self.get_params(ctx) for name in option.opts}
        kept, extra, waiting = [], [], list(args)
        while waiting:
            word = waiting.pop(0)
            name, equals, value = word.partition("=")
            if word == "--":
                kept += [word, *waiting]
                break
            if not word.startswith("--") or name in own:
                kept.append(word)
                option = own.get(name)
                if isinstance(option, click.Option) and not (option.is_flag or option.count or equals):
                    kept += waiting[:1]
                    del waiting[:1]
                continue
            if not equals:
                if not waiting or waiting[0].startswith("--"):
                    raise click.UsageError(f"no such option, or one without a value: {name}", ctx)
                value = waiting.pop(0)
            extra.append((name, value))
        ctx.obj = extra
        return super().parse_args(ctx, kept)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from .compression import allocations, methods

        for title, entries in (("Methods and their parameters", methods()), ("Allocations", allocations())):
            with formatter.section(title):
                for entry in entries:
                    formatter.write_dl([(f"{entry.name}  [{entry.paper}]", entry.summary)])
                    with formatter.indentation():
                        for parameter in entry.parameters:
                            name = f"--{entry.name}.{parameter.name.replace('_', '-')}"
                            formatter.write_dl([(name, f"{parameter.help} [default: {parameter.default}]")])


def _split(context: click.Context, parameter: click.Parameter, value: str | None) -> list[str] | None:
    if value is None:
        return None
    parts = [part.strip() for part in value.split(",") if part.strip()]
    if not parts:
        raise click.BadParameter("at least one is needed")
    return parts


def _shares(context: click.Context, parameter: click.Parameter, value: str) -> list[float]:
    try:
        return [float(part) for part in _split(context, parameter, value) or []]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a comma-separated list of numbers") from None


def _description(context: click.Context, parameter: click.Parameter, value: str | None) -> dict[str, Any] | None:
    if value is None:
        return None
    try:
        description = json.loads(Path(value).read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not JSON
        raise click.BadParameter(f"{value} is not JSON: {error}") from None
    if not isinstance(description, dict):
        raise click.BadParameter(f"{value} should hold a JSON object, but holds a {type(description).__name__}")
    return description


def _dtype(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    import torch

    found = getattr(torch, value or "float32", None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise click.BadParameter(f"{value!r} is not a type for weights, such as float32, bfloat16 or float16")
    return value


def _device(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    import torch

    try:
        torch.empty(0, device=value)
    except (RuntimeError, AssertionError) as error:
        raise click.BadParameter(f"{value!r} cannot be used: {str(error).partition(chr(10))[0]}") from None
    return value


def _method_settings(options: list[tuple[str, str]], method: str | None) -> dict[str, dict[str, Any]]:
    """`--svd-llm.shrinkage 1e-4` (or `--shrinkage 1e-4` where there is one method) by method, as strings."""
    found: dict[str, dict[str, Any]] = {}
    for option, value in options:
        owner, dot, parameter = option.removeprefix("--").rpartition(".")
        if not dot:
            if method is None:
                raise click.UsageError(f"no such option: {option} (parameters of a method are --METHOD.PARAMETER)")
            owner = method
        found.setdefault(owner, {})[parameter.replace("-", "_")] = value
    return found


def _refuse_unused(settings: Iterable[str], used: Iterable[str]) -> None:
    unused = [name for name in settings if name not in used]
    if unused:
        raise click.UsageError(
            f"there are parameters for {', '.join(unused)}, but only {', '.join(used)} take any here"
        )


def _print(what: Any) -> None:
    """On standard output, never cut: what is wider than the terminal, or than 80 columns of a file, stays whole."""
    stdout.print(what, crop=False, no_wrap=isinstance(what, str), overflow="ignore", highlight=False)


@contextmanager
def _progress(quiet: bool) -> Any:
    """A function that shows a bar for an iterable, on standard error."""
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=stderr, transient=True, disable=quiet or not stderr.is_terminal,
    )  # fmt: skip

    def show(items: Iterable[Any], label: str) -> Iterable[Any]:
        items = list(items)
        task = bar.add_task(label, total=len(items))
        for item in items:
            yield item
            bar.advance(task)
        bar.remove_task(task)

    with bar:
        yield bar, show


def _options(*names: str) -> Any:
    """Options that several commands share."""
    known = {
        "architecture": click.option("--architecture", type=click.Path(exists=True, dir_okay=False), metavar="FILE",
                                     callback=_description,
                                     help="JSON description of the model's architecture, if it is not built in."),
        "dtype": click.option("--dtype", callback=_dtype,
                              help="Load the model in this type, e.g. bfloat16. Default: as stored."),
        "device": click.option("--device", callback=_device, help="E.g. cuda. Default: the CPU."),
        "sequence_length": click.option("--sequence-length", type=int, help="Tokens in a sequence."),
        "sequences": click.option("--sequences", type=int, default=256, show_default=True,
                                  help="Calibration sequences, spread evenly over the data."),
        "batch_size": click.option("--batch-size", type=int, default=8, show_default=True),
        "fisher": click.option("--fisher", type=click.Choice(["empirical", "sampled"]), default="empirical",
                               show_default=True, help="Labels for gradients: the data's, or drawn from the model."),
        "roles": click.option("--roles", callback=_split, metavar="q,k,...",
                              help="Only these matrices: q, k, v, o, gate, up, down. Default: all."),
        "accumulate": click.option("--accumulate", type=click.Choice(["float32", "float64"]), default="float64",
                                   show_default=True, help="Precision in which statistics are added up."),
        "seed": click.option("--seed", type=int, default=0, show_default=True),
        "sequential": click.option("--sequential", is_flag=True,
                                   help="Calibrate each block on the compressed blocks before it."),
        "refit": click.option("--refit", is_flag=True, help="Refit the left factors afterwards (svd-llm)."),
        "overwrite": click.option("--overwrite", is_flag=True, help="Replace what the output folder holds."),
        "json": click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output."),
    }  # fmt: skip

    def decorate(function: Any) -> Any:
        for name in reversed(names):
            function = known[name](function)
        return function

    return decorate


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="transect")
def main_group() -> None:
    """Open up a trained transformer: factorize its weight matrices, compare methods, keep an ordinary checkpoint.

    MODEL is a local folder, a Hugging Face hub name, or `organism` (bundled). DATA is a .txt, .jsonl or .parquet file,
    a folder of them, a hub data set, or `organism:calibration` and `organism:heldout`.
    """
    if not stderr.is_terminal:  # a log is no place for transformers' bars
        import transformers

        transformers.logging.disable_progress_bar()


@main_group.command(cls=MethodCommand)
@click.argument("model")
@click.option("--method", required=True, help="See the list below.")
@click.option("--keep", type=float, required=True, help="Share of the matrices' bytes to keep, in (0, 1].")
@click.option("--data", help="Calibration data.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write the model to.")
@click.option("--allocation", default="uniform", show_default=True, help="How bytes are shared among the matrices.")
@click.option("--stream", is_flag=True, help="One block in memory at a time, straight from and to safetensors.")
@click.option("--cache", type=click.Path(path_type=Path), help="File to keep the statistics in.")
@_options("sequential", "refit", "roles", "sequence_length", "sequences", "batch_size", "fisher", "accumulate", "seed",
          "architecture", "dtype", "device", "overwrite", "json")  # fmt: skip
@click.pass_context
def compress(context: click.Context, model: str, out: Path, stream: bool, as_json: bool, **options: Any) -> None:
    """Compress MODEL by one method and write it as a checkpoint."""
    import torch

    from .checkpoint import check_output, open_model, save
    from .compression import allocation_named, method
    from .verbs import compress as compress_model
    from .verbs import compress_stream

    settings = _method_settings(context.obj, options["method"])
    own = method(options["method"]).settings(settings.pop(options["method"], {}))
    sharing = allocation_named(options["allocation"]).settings(settings.pop(options["allocation"], {}))
    own |= {f"allocation_{name}": value for name, value in sharing.items()}
    _refuse_unused(settings, (options["method"], options["allocation"]))
    overwrite, architecture = options.pop("overwrite"), options.pop("architecture")
    dtype, device = options.pop("dtype"), options.pop("device")
    options["accumulate"] = getattr(torch, options["accumulate"])
    check_output(out, overwrite)
    with _progress(as_json) as (_, show):
        if stream:
            for name in ("refit", "cache", "roles"):
                if options.pop(name):
                    raise click.UsageError(f"--{name} cannot be combined with --stream")
            outcome = compress_stream(
                model, out, overwrite=overwrite, architecture=architecture, dtype=dtype, device=device, progress=show,
                **options, **own,
            )  # fmt: skip
        else:
            opened = open_model(model, dtype=dtype, device=device, architecture=architecture)
            tokenizer = opened.tokenizer or opened.processor
            compressed = compress_model(opened.model, **options, tokenizer=tokenizer, progress=show, **own)
            save(compressed, out, tokenizer, overwrite=overwrite)
            outcome = compressed.__dict__["_structure_record"].history[-1]
    outcome = {"out": str(out), **{key: outcome[key] for key in ("kept", "matrix_bytes", "dense_matrix_bytes")}}
    if as_json:
        click.echo(json.dumps(outcome))
    else:
        _print(f"{out}: kept {outcome['kept']:.1%} of {outcome['dense_matrix_bytes']:,} bytes of matrices")


@main_group.command(cls=MethodCommand)
@click.argument("model")
@click.option("--methods", required=True, callback=_split, help="Comma-separated; see the list below.")
@click.option("--keep", required=True, callback=_shares, help="Comma-separated shares of bytes, in (0, 1].")
@click.option("--data", help="Calibration data.", required=True)
@click.option("--eval", "eval_data", help="Held-out data.", required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Run folder; a run in it is continued.")
@click.option("--allocation", "allocations", default="uniform", show_default=True, callback=_split,
              help="Comma-separated.")  # fmt: skip
@click.option("--eval-sequences", type=int, help="Use so many held-out sequences, evenly spaced. Default: all.")
@click.option("--workers", type=int, default=1, show_default=True, help="Processes that compute rows.")
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True)
@_options("sequential", "refit", "roles", "sequence_length", "sequences", "batch_size", "fisher", "accumulate", "seed",
          "architecture", "dtype", "device", "overwrite", "json")  # fmt: skip
@click.pass_context
def compare(context: click.Context, model: str, out: Path, as_json: bool, **options: Any) -> None:
    """Compress MODEL by every method to every budget, evaluate each, and write a table and a Pareto plot."""
    import torch

    from .checkpoint import open_model
    from .compression import allocation_named, method
    from .report import rich_table
    from .verbs import compare as compare_models

    settings = _method_settings(context.obj, None)
    for name in options["methods"]:
        method(name)
    for name in options["allocations"]:
        allocation_named(name)
    _refuse_unused(settings, [*options["methods"], *options["allocations"]])
    opened = open_model(model, dtype=options.pop("dtype"), device=options.pop("device"),
                      architecture=options.pop("architecture"))  # fmt: skip
    options["accumulate"] = getattr(torch, options["accumulate"])
    rows = 1 + len(options["methods"]) * len(options["allocations"]) * len(options["keep"])
    with _progress(as_json) as (bar, show):
        task = bar.add_task("rows", total=rows)
        frame = compare_models(
            opened, data=options.pop("data"), eval_data=options.pop("eval_data"), out=out, settings=settings,
            progress=show, on_row=lambda row: bar.advance(task), **options,
        )  # fmt: skip
    if as_json:
        click.echo(frame.to_json(orient="records"))
        return
    _print(rich_table(frame, f"{model}, {int(frame['tokens'].iloc[0]):,} held-out predictions"))
    _print(f"run folder: {out}   plot: {out / 'pareto.png'}")


@main_group.command()
@click.argument("model")
@click.option("--data", required=True, help="Training data; never the text that the result is evaluated on.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write the model to.")
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
@click.option("--device", callback=_device, help="Where to train. Default: a GPU if there is one (accelerate decides).")
@_options("sequence_length", "batch_size", "seed", "architecture", "dtype", "overwrite", "json")
def recover(model: str, data: str, out: Path, teacher: str | None, as_json: bool, **options: Any) -> None:
    """Repair MODEL by a short training after any compression, and write it as a checkpoint.

    The same command goes on from what an interrupted one has left. It also runs under `accelerate launch`.
    """
    from .checkpoint import check_output, open_model
    from .recovery import Check, Machine
    from .verbs import recover as recover_model

    check_output(out, options["overwrite"])
    loading = {name: options.pop(name) for name in ("dtype", "architecture")}
    main = Machine(options["device"]).is_main

    with _progress(as_json or not main) as (_, show):

        def say(check: Check) -> None:
            if main and not as_json:
                stderr.print(
                    f"{check.name}: step {check.step}/{check.steps}   loss {check.loss:.4f}   "
                    f"held-out {check.held_out:.4f}"
                )

        opened = open_model(model, **loading)
        dense = None if teacher is None else open_model(teacher, **loading)
        recovered = recover_model(
            opened, data, teacher=dense, out=out, progress=show, on_check=say, **options
        )  # fmt: skip
    if not main:
        return
    outcome = recovered.__dict__["_structure_record"].history[-1]
    if as_json:
        click.echo(json.dumps({"out": str(out), **outcome}))
        return
    _print(
        f"{out}: held-out loss {outcome['loss_before']:.4f} -> {outcome['loss_after']:.4f} (kept: {outcome['kept']})"
    )
    _print(
        f"it took {outcome['seconds']:.0f} s, {outcome['steps']} steps and {outcome['tokens']:,} tokens, and trained "
        f"{outcome['trained_parameters']:,} numbers"
    )


@main_group.command("eval")
@click.argument("model")
@click.option("--data", required=True, help="Held-out data.")
@click.option("--sequences", type=int, help="Use so many sequences, evenly spaced. Default: all.")
@_options("sequence_length", "batch_size", "seed", "architecture", "dtype", "device", "json")
def evaluate(model: str, data: str, as_json: bool, **options: Any) -> None:
    """Loss, perplexity, accuracy, speed, memory and size of MODEL."""
    import pandas as pd

    from .checkpoint import open_model
    from .report import rich_table
    from .verbs import evaluate as evaluate_model

    opened = open_model(model, dtype=options.pop("dtype"), device=options.pop("device"),
                      architecture=options.pop("architecture"))  # fmt: skip
    result = evaluate_model(opened, data, **options)
    if as_json:
        click.echo(json.dumps(result))
    else:
        _print(rich_table(pd.DataFrame([result]), f"{model}, {result['tokens']:,} predictions"))


@main_group.command()
@click.argument("name", required=False)
@_options("json")
def methods(name: str | None, as_json: bool) -> None:
    """List the methods and allocations, or the parameters of one."""
    from .compression import allocation_named, allocations, method
    from .compression import methods as all_methods

    if name is None:
        entries = [*all_methods(), *allocations()]
    else:
        known = {entry.name: entry for entry in allocations()}
        entries = [allocation_named(name) if name in known else method(name)]
    if as_json:
        described = [
            {
                "name": entry.name, "family": entry.family, "paper": entry.paper, "summary": entry.summary,
                "needs": [statistic.label for statistic in entry.needs],
                "parameters": [
                    {"name": p.name, "default": p.default, "type": p.kind.__name__, "choices": p.choices,
                     "range": p.range and [p.range.low, p.range.high], "help": p.help}
                    for p in entry.parameters
                ],
            }
            for entry in entries
        ]  # fmt: skip
        click.echo(json.dumps(described, indent=2))
        return
    if name is None:
        grid = Table("name", "family", "paper", "what it does")
        for entry in entries:
            grid.add_row(entry.name, entry.family, entry.paper, entry.summary)
        stdout.print(grid)
        return
    import inspect

    entry = entries[0]
    _print(f"{entry.name} ({entry.family}), {entry.paper}")
    _print(f"needs: {', '.join(statistic.label for statistic in entry.needs) or 'no data'}\n")
    _print(inspect.getdoc(entry.function) or "")
    grid = Table("parameter", "type", "default", "accepts")
    for p in entry.parameters:
        accepts = (
            ", ".join(map(str, p.choices)) if p.choices else f"{p.range.low:g} to {p.range.high:g}" if p.range else ""
        )
        grid.add_row(p.name, p.kind.__name__, str(p.default), accepts)
    if entry.parameters:
        stdout.print(grid)


@main_group.command("claims")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--model", default="organism", show_default=True, metavar="MODEL")
@click.option("--data", help="Calibration data. Default with the bundled model: organism:calibration.")
@click.option("--eval", "eval_data", help="Held-out data. Default with the bundled model: organism:heldout.")
@click.option("--eval-sequences", type=int, default=128, show_default=True,
              help="Held-out sequences, spread evenly over the data.")  # fmt: skip
@_options("sequence_length", "sequences", "batch_size", "seed", "architecture", "dtype", "device", "json")
def check_claims(
    names: tuple[str, ...], model: str, data: str | None, eval_data: str | None, as_json: bool, **options: Any
) -> None:
    """Check what papers claim of their methods on MODEL (in float32); each NAME is a claim or a method."""
    from .claims.show import rich_outcome
    from .verbs import check_claims as check

    options["dtype"] = options["dtype"] or "float32"
    with _progress(as_json) as (_, show):
        outcomes = check(names, model, data, eval_data, progress=show, **options)
    if as_json:
        click.echo(json.dumps([outcome.to_dict() for outcome in outcomes], indent=2))
        return
    for outcome in outcomes:
        stdout.print(rich_outcome(outcome))
    verdicts = [str(outcome.result.verdict) for outcome in outcomes]
    stdout.print(", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts)))


def _complain(message: str) -> NoReturn:
    """One line on standard error, whatever the message is made of, and exit code 1."""
    stderr.print(Text.assemble(("error:", "bold red"), " ", " ".join(message.split())), soft_wrap=True)
    sys.exit(1)


def _note_interrupts() -> list[int]:
    """Let Ctrl-C also leave a note here: torch and safetensors may swallow the exception into one of their own."""
    noted: list[int] = []

    def on_interrupt(number: int, frame: Any) -> None:
        noted.append(number)
        signal.default_int_handler(number, frame)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, on_interrupt)
    return noted


def main() -> None:
    """Entry point: errors that a user can mend are one line, without a traceback. Exit code 1; 130 for Ctrl-C."""
    from .errors import TransectError

    interrupts = _note_interrupts()
    try:
        main_group(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _stopped()
    except Exception as error:
        if interrupts:
            _stopped()
        if isinstance(error, click.ClickException):
            error.show()
            sys.exit(error.exit_code)
        if isinstance(error, TransectError):
            _complain(str(error))
        if isinstance(error, OSError):  # a disk that is full, a folder that may not be written to
            _complain(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        raise


def _stopped() -> NoReturn:
    stderr.print("stopped")
    sys.exit(130)
