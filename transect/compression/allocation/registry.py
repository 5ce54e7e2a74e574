"""How a budget is shared out, chosen apart from the method that spends it.

There are two kinds. A `ranking` decides the ranks of factorizations from their spectra. A `sharing` gives every matrix
a share of its bytes, without knowing the method, so it goes with every method that compresses block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ...anatomy import Matrix
from ...errors import TransectError
from ...statistics import Statistic, Statistics
from ..registry import Method
from .table import Ranks, RankTable, Shares, Unit

# One matrix's score, from its weights or from what was measured: score(matrix, statistics, **settings).
Score = Callable[..., float]


class Measure(Protocol):
    """Divergence of the compressed model's predictions from the dense model's."""

    def __call__(self, ranks: Mapping[str, int | None]) -> float:
        """With these ranks by matrix name; matrices that are not named stay dense."""
        ...

    def of_each(self, ranks: Mapping[str, int], predictions: int) -> dict[str, float]:
        """By matrix name, with that matrix alone at its rank, on sequences that have at least so many predictions."""
        ...


_allocations: dict[str, Method] = {}
_measuring: set[str] = set()


def ranking(name: str, *, paper: str = "-", measures: bool = False) -> Callable[[Any], Any]:
    """Register `function(tables, keep, measure, **settings) -> Ranks`.

    measures: it runs the model while it searches; `measure` is None for the others.
    """

    def register(function: Callable[..., Ranks]) -> Callable[..., Ranks]:
        _allocations[name] = Method(name, "ranking", paper, function)
        if measures:
            _measuring.add(name)
        return function

    return register


def sharing(
    name: str, *, paper: str = "-", needs: Sequence[Statistic] = (), score: Score | None = None
) -> Callable[[Any], Any]:
    """Register `function(units, keep, scores, **settings) -> Shares`, of which Σ bytes · share <= keep Σ bytes.

    score: `score(matrix, statistics, **settings)`, called for one matrix after another, with the block's weights and
    statistics at hand; its numbers come as `scores`, by matrix name (empty without it). needs: for the score.
    """

    def register(function: Callable[..., Shares]) -> Callable[..., Shares]:
        _allocations[name] = Method(name, "sharing", paper, function, tuple(needs), plan=score)
        return function

    return register


def allocation_named(name: str) -> Method:
    """The allocation of that name, or an error that lists the known ones."""
    if name not in _allocations:
        raise TransectError(f"unknown allocation {name!r}; known: {', '.join(_allocations)}")
    return _allocations[name]


def allocations() -> list[Method]:
    """All registered allocations."""
    return list(_allocations.values())


def needs_measure(name: str) -> bool:
    """Whether the allocation runs the model while it searches."""
    return allocation_named(name).name in _measuring


def is_ranking(name: str) -> bool:
    """Whether it decides ranks from spectra, and so goes with factorizations only."""
    return allocation_named(name).family == "ranking"


def allocate_ranks(
    name: str, tables: Sequence[RankTable], keep: float, measure: Measure | None, settings: Mapping[str, Any]
) -> Ranks:
    """Ranks for all matrices, by a ranking, whose bytes are at most `keep` of the dense ones."""
    if keep == 1:
        return {table.name: None for table in tables}
    chosen = allocation_named(name)
    return chosen.function(tables, keep, measure, **chosen.settings(settings))


def scores_of(
    name: str, matrices: Sequence[Matrix], statistics: Statistics | None, settings: Mapping[str, Any]
) -> dict[str, float]:
    """A sharing's scores of some matrices; empty if it has none."""
    chosen = allocation_named(name)
    if chosen.plan is None:
        return {}
    return {matrix.name: float(chosen.plan(matrix, statistics, **chosen.settings(settings))) for matrix in matrices}


class Scores:
    """The scores of one dense model's matrices, computed once for each sharing and its settings, for any budget."""

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        self._matrices = matrices
        self._known: dict[Any, dict[str, float]] = {}

    def of(self, name: str, statistics: Statistics | None, settings: Mapping[str, Any]) -> dict[str, float]:
        """See `scores_of`. The matrices must be dense when a sharing is asked for the first time."""
        key = (name, *sorted(settings.items()))
        if key not in self._known:
            self._known[key] = scores_of(name, self._matrices, statistics, settings)
        return self._known[key]


def share_out(
    name: str, matrices: Sequence[Matrix], keep: float, scores: Mapping[str, float], settings: Mapping[str, Any]
) -> Shares:
    """Every matrix's share of its bytes, by a sharing. scores: of all of them, see `scores_of`."""
    chosen = allocation_named(name)
    units = [Unit.of(matrix) for matrix in matrices]
    if keep == 1:
        return {unit.name: 1.0 for unit in units}
    return chosen.function(units, keep, scores, **chosen.settings(settings))
