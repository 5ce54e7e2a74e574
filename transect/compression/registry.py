"""A method is a function whose signature is its configuration.

A decorator declares one: `factorization` (low rank, one matrix), `replacement` (another structure, one matrix),
`slicing` (one block made smaller) or `restructuring` (the whole model). The function's keyword-only parameters with a
default are the settings that a user can choose. They are validated against their annotations, listed by
`transect methods`, and written into the checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import TransectError
from ..operators.grouped_integer import BITS
from ..parameters import Parameter, parameters_of, settings_of, summary_of
from ..parameters import Range as Range
from ..parameters import Seed as Seed
from ..statistics import Statistic


@dataclass(frozen=True)
class Rounding:
    """How numbers are stored in few bits: `rtn` or `gptq`, with so many bits, in groups of so many; see `rounding`."""

    method: Method
    bits: int
    group: int


@dataclass(frozen=True)
class Method:
    """A registered function with what a user and the frame have to know of it.

    family: `factorization`, `replacement`, `slicing`, `restructuring` or `allocation`; it decides how the function is
        called, see the decorators of these names.
    needs: the statistics that it is given. data: it runs the model on the calibration data themselves, so it must be
        given some even where it needs no statistic. refit: its result can be refitted by least squares afterwards.
    plan: what finds out, before any work, how large the result may be; see the decorators.
    prepare: what a restructuring does once for all budgets; see there. by_block: how it is streamed, if it can be.
    allocation: how its budget is shared out where the user names no allocation.
    even: what a matrix's size leaves over of its share is not spent on leaving others dense.
    note: what a user should know beside the numbers of a table, a sentence without its full stop.
    rounding: how the numbers of what it makes are stored, for `NAME+gptq4` and its like; None: as the model's.
    """

    name: str
    family: str
    paper: str
    function: Callable[..., Any]
    needs: tuple[Statistic, ...] = ()
    refit: bool = False
    data: bool = False
    plan: Callable[..., Any] | None = None
    prepare: Callable[..., Any] | None = None
    by_block: ByBlock | None = None
    allocation: str = "uniform"
    even: bool = False
    note: str = ""
    rounding: Rounding | None = None

    @property
    def collects(self) -> tuple[Statistic, ...]:
        """The statistics that are collected for it: what it needs, and what the rounding does."""
        rounding = () if self.rounding is None else self.rounding.method.needs
        return tuple(dict.fromkeys([*self.needs, *rounding]))

    @property
    def summary(self) -> str:
        """First sentence of the function's docstring."""
        return summary_of(self.function)

    @property
    def wants(self) -> list[str]:
        """What it needs, for a reader: its statistics, or the calibration data themselves."""
        return [statistic.label for statistic in self.collects] or ["calibration data"] * self.data

    @property
    def parameters(self) -> list[Parameter]:
        """The settings that a user can choose."""
        return parameters_of(self.function)

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All settings: the ones given, validated, and the defaults of the others."""
        return settings_of(self.function, self.name, given)


@dataclass(frozen=True)
class Size:
    """How large a replacement of one matrix is: its stored bytes, and what the method calls that size by.

    bytes: everything that it stores but the bias. chosen: keyword arguments for the method, such as {"rank": 12}.
    """

    bytes: int
    chosen: Mapping[str, Any]


@dataclass(frozen=True)
class ByBlock:
    """How a restructuring that only chooses, for each matrix, among ways to store it is done one block at a time.

    check: `check(**settings)`; raises TransectError for settings with which it cannot be.
    options: `options(block, statistics, **settings)`, the ways for a block that has its weights, in the same order each
        time; each has `bytes`, and a `put(block)` that changes the block.
    choose: `choose(options, budget)`, those of all blocks that are taken; OutOfReach where nothing is so small.
    """

    check: Callable[..., None]
    options: Callable[..., Sequence[Any]]
    choose: Callable[[Sequence[Any], float], Sequence[Any]]


_methods: dict[str, Method] = {}
Register = Callable[[Callable[..., Any]], Callable[..., Any]]


def _register(family: str, name: str, paper: str, needs: Sequence[Statistic], **more: Any) -> Register:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _methods[name] = Method(name, family, paper, function, tuple(needs), **more)
        return function

    return register


def factorization(
    name: str, *, paper: str, needs: Sequence[Statistic] = (), refit: bool = False, allocation: str = "uniform"
) -> Register:
    """Register `function(weight, *statistics, **settings) -> Factorization` as a low-rank method.

    weight: W (d_out x d_in), float64. The statistics come as their `value`s, float64, on the weight's device. One
    factorization serves every budget: its leading ranks are kept.
    allocation: the default for this method, where its paper has one of its own; so it is for the next two as well.
    """
    return _register("factorization", name, paper, needs, refit=refit, allocation=allocation)


def replacement(
    name: str,
    *,
    paper: str,
    size: Callable[..., Size],
    needs: Sequence[Statistic] = (),
    refit: bool = False,
    allocation: str = "uniform",
    even: bool = False,
    note: str = "",
) -> Register:
    """Register `function(weight, *statistics, **size.chosen, **settings) -> Operator`: one matrix, one operator.

    weight and statistics as for a factorization; the operator may be in float64 and without a bias, the frame gives it
    the matrix's dtype and bias (`operator.with_bias`).
    size: `size(shape, itemsize, keep, **settings)`, the largest Size of at most `keep` of the dense bytes for a matrix
        of that shape; it raises OutOfReach where there is none. A method of one size only (2:4) returns that where it
        fits; the frame then leaves as many matrices dense as the budget allows.
    even: it does not, since engines want all matrices stored alike, and a few dense ones buy little.
    note: see `Method`.
    """
    more = {"refit": refit, "allocation": allocation, "even": even, "note": note}
    return _register("replacement", name, paper, needs, plan=size, **more)


def slicing(
    name: str,
    *,
    paper: str,
    check: Callable[..., None],
    needs: Sequence[Statistic] = (),
    allocation: str = "uniform",
) -> Register:
    """Register `function(block, statistics, keep, **settings) -> None`: it shrinks one block, in place.

    The function uses the anatomy's units (`block.attention.keep`, `block.mlp.keep`, `matrix.replace`). statistics:
    `transect.statistics.Statistics` of that block's matrices (and of the block itself, under `blocks.<index>`).
    keep: share of the bytes of this block's matrices that may remain.
    check: `check(block, keep, **settings)`, called for every block before any work; raises OutOfReach or TransectError.
    """
    return _register("slicing", name, paper, needs, plan=check, allocation=allocation)


def restructuring(
    name: str,
    *,
    paper: str,
    check: Callable[..., None],
    needs: Sequence[Statistic] = (),
    data: bool = False,
    prepare: Callable[..., Any] | None = None,
    by_block: ByBlock | None = None,
) -> Register:
    """Register `function(anatomy, calibration, keep, **settings) -> None`: it changes the model as a whole, in place.

    For what cannot be done block by block: dropping the least important units of all, sharing parameters between
    blocks. calibration: `Calibration`, the statistics that it needs and the calibration data themselves.
    check: `check(anatomy, keep, **settings)`, called before any work; raises OutOfReach or TransectError.
    data: it uses `calibration.batches`, and is refused without calibration data even if `needs` is empty.
    prepare: `prepare(anatomy, calibration, **settings)`, what does not depend on the budget; the function is given the
        result behind `keep` (None at keep 1). A comparison calls it once for all budgets, on the dense model, which
        stays as it is: the function may then be given a copy of that.
    by_block: what `--stream` goes by; without it, it is refused.
    """
    more = {"data": data, "prepare": prepare, "by_block": by_block}
    return _register("restructuring", name, paper, needs, plan=check, **more)


@dataclass(frozen=True)
class Calibration:
    """What a restructuring is given of the calibration data.

    statistics: of the dense model, what the method needs. batches: the data themselves, `transect.data.Batches`; an
    error if there are none. progress: wraps a loop to show it, or None.
    """

    statistics: Any
    data: Any
    seed: int = 0
    progress: Callable[..., Any] | None = None

    @property
    def batches(self) -> Any:
        """The data, or an error if there are none."""
        if self.data is None:
            raise TransectError("this method runs the model on calibration data: pass data=")
        return self.data

    def shown(self, items: Any, label: str) -> Any:
        """The items, with a progress bar if there is one."""
        return self.progress(items, label) if self.progress else items

    def ticked(self, count: int, label: str) -> Callable[..., None]:
        """What to call at the end of each of so many rounds, to move a progress bar on, if there is one."""
        rounds = iter(self.shown(range(count), label))
        next(rounds, None)
        return lambda *_: next(rounds, None)


def method(name: str) -> Method:
    """The method of that name, or an error that lists the known ones. `NAME+gptq4` is NAME in few bits."""
    base, plus, rounding = name.partition("+")
    if base not in _methods:
        raise TransectError(f"unknown method {base!r}; known: {', '.join(sorted(_methods))}")
    if not plus:
        return _methods[base]
    return replace(_methods[base], name=name, rounding=_rounding(rounding))


def _rounding(name: str) -> Rounding:
    """Of `rtn4`, `gptq4` or `gptq4g32`."""
    found = re.fullmatch(r"(rtn|gptq)(\d+)(?:g(\d+))?", name)
    bits, group = (int(found[2]), int(found[3] or 64)) if found else (0, 64)
    if found is None or bits not in BITS or not 1 <= group <= 65536:
        raise TransectError(
            f"{name!r} is no way to store numbers; what comes after a method's + is rtn or gptq, one of {BITS} bits, "
            "and perhaps a group, such as gptq4 or rtn3g32"
        )
    return Rounding(method(found[1]), bits, group)


def methods() -> list[Method]:
    """All registered methods, by name."""
    return [_methods[name] for name in sorted(_methods)]
