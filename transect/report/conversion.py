"""What a conversion left and what it costs, as lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .lengths import COSTS, costs


def lines_of(outcome: Mapping[str, Any], folder: str, loader: str) -> Iterator[str]:
    """What a user asks of a converted model: is it right, is it faster, does it generate, and how to load it.

    loader: the class of transformers that loads its folder.
    """
    if "loss_dense" in outcome:
        yield (
            f"{folder}: held-out loss {outcome['loss_dense']:.4f} -> {outcome['loss_converted']:.4f} converted -> "
            f"{outcome['loss_after']:.4f} trained"
            if outcome["stages"]
            else f"{folder}: held-out loss {outcome['loss_dense']:.4f} -> {outcome['loss_converted']:.4f} converted"
        )
    for text in outcome["texts"].values():
        (dense, converted, after), (first, last) = text["loss"], text["error"]
        yield (
            f"evaluation: {dense:.4f} as it was; converted {converted - dense:+.4f}{_error(first)}"
            + (f"; trained {after - dense:+.4f}{_error(last)}" if outcome["stages"] else "")
        )
    for words, number in outcome["told"].items():
        yield f"{words}: {number:.4g}"
    for stage in outcome["stages"]:
        yield (
            f"{stage['name']}: {stage['trained']:,} numbers trained, {stage['steps']} steps and {stage['tokens']:,} "
            f"tokens in {stage['seconds']:.0f} s"
        )
    (parameters, less), (size, smaller) = outcome["parameters"], outcome["bytes"]
    yield f"{parameters:,} -> {less:,} parameters, {size / 1e6:.2f} -> {smaller / 1e6:.2f} MB"
    if outcome["quality"]:
        yield from _table(*outcome["quality"])
    if outcome["generates"] is not None:
        alike = "the same as" if outcome["generates"] else "NOT the same as"
        yield f"generation with the cache writes {alike} without it"
    yield (
        f'load it with {loader}.from_pretrained("{folder}") after `import transect`, or without Transect '
        "with trust_remote_code=True"
    )


def _error(error: float | None) -> str:
    return "" if error is None else f" ± {error:.4f}"


def _table(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> Iterator[str]:
    """Both models at each length of prompt; of the converted one also the ratio to the model as it was."""
    rows = [["prompt", *(heading for heading, _ in COSTS.values())]]
    rows += [[f"{new['length']:,}", *costs(new, old)] for old, new in zip(before, after, strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    yield from ("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
