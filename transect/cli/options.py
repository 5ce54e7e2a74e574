"""Options that several commands share, and the checks of their values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import TransectError
from ..parameters import pieces
from ..store import read_any_json


class Place(click.Path):
    """The name of a file or folder to write."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """An empty name would be the working folder's."""
        if not str(value).strip():
            self.fail("a name is needed", param, ctx)
        return super().convert(value, param, ctx)


LOADING = ("revision", "architecture", "dtype", "device")


def split(context: click.Context, parameter: click.Parameter, value: str | None) -> list[str] | None:
    """Callback: the parts of a comma-separated option; None if it is not given."""
    if value is None:
        return None
    parts = pieces(value)
    if not parts:
        raise click.BadParameter("at least one is needed")
    return parts


def shares(context: click.Context, parameter: click.Parameter, value: str) -> list[float]:
    """Callback: the numbers of a comma-separated option."""
    try:
        return [float(part) for part in split(context, parameter, value) or []]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a comma-separated list of numbers") from None


def whole_numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> list[int] | None:
    """Callback: the whole numbers of a comma-separated option; None if it is not given."""
    if value is None:
        return None
    try:
        return [int(part) for part in split(context, parameter, value) or []]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a comma-separated list of whole numbers") from None


def description_file(context: click.Context, parameter: click.Parameter, value: str | None) -> dict[str, Any] | None:
    """Callback: the JSON object that the named file holds."""
    if value is None:
        return None
    try:
        description = read_any_json(Path(value))
    except TransectError as error:
        raise click.BadParameter(f"not JSON: {error}") from None
    if not isinstance(description, dict):
        raise click.BadParameter(f"{value} should hold a JSON object, but holds a {type(description).__name__}")
    return description


def dtype_name(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Callback: the name of a type for weights, checked."""
    from ..verbs.arguments import weight_type

    try:
        return value if value is None else str(weight_type(value)).removeprefix("torch.")
    except TypeError:
        raise click.BadParameter(f"{value!r} is not a type for weights, such as float32, bfloat16 or float16") from None


def device_name(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Callback: the name of a device that torch can use here."""
    from ..verbs.arguments import usable_device

    try:
        return value if value is None else usable_device(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} cannot be used: {error}") from None


def opening(options: dict[str, Any]) -> dict[str, Any]:
    """Take out of a command's options those that say how MODEL is opened."""
    return {name: options.pop(name) for name in LOADING if name in options}


def shared_options(*names: str) -> Any:
    """Decorator: adds the named ones of the options below to a command, in this order."""
    known = {
        "architecture": click.option("--architecture", type=click.Path(exists=True, dir_okay=False), metavar="FILE",
                                     callback=description_file,
                                     help="JSON description of the model's architecture, if it is not built in."),
        "revision": click.option("--revision", metavar="NAME",
                                 help="Branch, tag or commit of MODEL on the hub. Default: its main branch."),
        "dtype": click.option("--dtype", callback=dtype_name,
                              help="Load the model in this type, e.g. bfloat16. Default: as stored."),
        "device": click.option("--device", callback=device_name, help="E.g. cuda. Default: the CPU."),
        "sequence_length": click.option("--sequence-length", type=int, help="Tokens in a sequence. Default: what the "
                                        "model allows, at most 2048."),
        "inspected_length": click.option("--sequence-length", type=int, help="Tokens in a sequence. Default: what the "
                                         "model allows, at most 512."),
        "special_tokens": click.option("--special-tokens", type=click.Choice(["auto", "none"]), default="auto",
                                       show_default=True,
                                       help="What sequences of text begin with: as the tokenizer's texts do, or none."),
        "sequences": click.option("--sequences", type=int, default=256, show_default=True,
                                  help="Calibration sequences, spread evenly over the data."),
        "batch_size": click.option("--batch-size", type=int, default=8, show_default=True),
        "facts": click.option("--facts", metavar="FILE", help="Facts with their subjects: .json, .jsonl or `common`."),
        "choices": click.option("--choices", metavar="FILE", help="Multiple-choice items: .json, .jsonl or `common`."),
        "passages": click.option("--passages", metavar="FILE",
                                 help="Passages with their endings: .json, .jsonl or `common`."),
        "fisher": click.option("--fisher", type=click.Choice(["empirical", "sampled"]), default="empirical",
                               show_default=True, help="Labels for gradients: the data's, or drawn from the model."),
        "roles": click.option("--roles", callback=split, metavar="q,k,...",
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
