"""Nested lists of digits under max, min, median and sum modulo ten (ListOps, Nangia & Bowman 2018, in long form)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import torch

from ..errors import TransectError
from ..parameters import Range
from .registry import Drawn, task

_DIGITS, _OPERATORS, _CLOSE, _EQUALS, _NOTHING = 10, ("max", "min", "median", "sum"), 14, 15, 16


@task("listops", paper="arXiv:1804.06028")
def listops(
    count: int, generator: torch.Generator, *, length: Annotated[int, Range(8, 2**20)] = 128,
    depth: Annotated[int, Range(1, 64)] = 6, operands: Annotated[int, Range(2, 64)] = 5,
) -> Drawn:  # fmt: skip
    """An expression such as [max 2 9 [min 4 7] 0], an equals sign, and its value, a digit, as the answer.

    Ids 0 to 9 are digits, 10 to 13 open a list under an operator, 14 closes one, 15 is the equals sign, 16 fills the
    front, so that the answer is always the last token. Expressions are drawn by us, as long as the length allows.

    length: of the whole.
    depth: of the deepest list.
    operands: the most in a list.
    """
    if length < operands + 4:
        raise TransectError(f"listops: {operands} operands need a length of {operands + 4} or more, not {length}")
    tokens = torch.full((count, length), _NOTHING)
    draws = torch.randint(0, 2**31, (count, 8 * length), generator=generator).tolist()
    for row, numbers in enumerate(draws):
        said: list[int] = []
        value = _draw(iter(numbers), said, length - 2, depth, operands, top=True)
        tokens[row, -len(said) - 2 :] = torch.tensor([*said, _EQUALS, value])
    answers = torch.zeros(count, length, dtype=torch.bool)
    answers[:, -1] = True
    return Drawn(tokens, answers, _NOTHING + 1)


def _draw(numbers: Iterator[int], said: list[int], room: int, depth: int, operands: int, top: bool = False) -> int:
    """Append a digit or a list of at most `room` tokens to `said`; its value."""
    if not top and (depth == 0 or room < 4 or next(numbers) % 2):
        said.append(next(numbers) % _DIGITS)
        return said[-1]
    operator = next(numbers) % len(_OPERATORS)
    said.append(_DIGITS + operator)
    end = len(said) + room - 2  # behind which only the closing bracket fits
    values = []
    most = min(operands, room - 2)
    for left in range(2 + next(numbers) % (most - 1), 0, -1):
        space = end - len(said) - (left - 1)  # a digit for each operand to come
        values.append(_draw(numbers, said, space, depth - 1, operands))
    said.append(_CLOSE)
    return value_of(_OPERATORS[operator], values)


def value_of(operator: str, values: list[int]) -> int:
    """The value of a list of digits; of an even number of them the median is the lower of the middle two."""
    if operator == "sum":
        return sum(values) % 10
    if operator == "median":
        return sorted(values)[(len(values) - 1) // 2]
    return max(values) if operator == "max" else min(values)
