"""Tables as chains of if and elif."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

Outcome = TypeVar("Outcome", bound=Hashable)
Cases = list[tuple[str, Outcome]]  # conditions in their order; that of the last is empty: it holds for all the rest


def by_value(name: str, table: Mapping[str | int, Outcome]) -> Cases[Outcome]:
    """The values of `name` with the same outcome together, in the table's order; the most frequent outcome last."""
    groups: dict[Outcome, list[str]] = {}
    for value, outcome in table.items():
        groups.setdefault(outcome, []).append(repr(value))
    last = max(groups, key=lambda outcome: len(groups[outcome]))
    cases = [
        (f"{name} == {values[0]}" if len(values) == 1 else f"{name} in {{{', '.join(values)}}}", outcome)
        for outcome, values in groups.items()
        if outcome != last
    ]
    return [*cases, ("", last)]


def by_limit(name: str, values: Sequence[int], outcomes: Sequence[Outcome]) -> Cases[Outcome]:
    """Neighbouring values of `name` with the same outcome together. values: rising."""
    ends = [i for i in range(len(values) - 1) if outcomes[i] != outcomes[i + 1]]
    return [(f"{name} <= {values[i]}", outcomes[i]) for i in ends] + [("", outcomes[-1])]


def chain(cases: Cases[Outcome], body: Callable[[Outcome], list[str]]) -> list[str]:
    """The lines. body: those of an outcome, which return in every case."""
    lines = []
    for number, (condition, outcome) in enumerate(cases):
        if condition:
            lines += [f"{'elif' if number else 'if'} {condition}:", *(f"    {line}" for line in body(outcome))]
        else:
            lines += body(outcome)
    return lines
