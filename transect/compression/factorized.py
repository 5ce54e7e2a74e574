"""The matrices of one model, factorized once by one method: from here any budget and allocation is cheap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from ..anatomy import Anatomy, Matrix
from ..errors import TransectError
from .allocation import Ranks, allocate_ranks, is_ranking, needs_measure, rank_of_share
from .allocation.registry import Scores, share_out
from .divergence import Divergence
from .frame import rank_table
from .weighted_svd import Factorization

SEARCH_SEQUENCES = 32  # on which an allocation that runs the model measures it (LEMS)


class Factorized:
    """factors: by matrix name. batches: calibration data, for an allocation that runs the model while it searches.

    Measurements of such a search are remembered, and the scores of a sharing, so that several budgets share them.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        matrices: Sequence[Matrix],
        factors: Mapping[str, Factorization],
        batches: Any = None,
        scores: Scores | None = None,
    ) -> None:
        self.anatomy, self.matrices, self.factors, self.batches = anatomy, list(matrices), factors, batches
        self.scores = scores or Scores(self.matrices)

    @cached_property
    def tables(self) -> list[Any]:
        """What every rank of each matrix costs and loses."""
        return [rank_table(matrix, self.factors[matrix.name]) for matrix in self.matrices]

    @cached_property
    def measure(self) -> Divergence:
        """How far a model of these factors is from the dense one, on the first search sequences."""
        if self.batches is None:
            raise TransectError("this allocation measures the model on calibration data: pass data=")
        search = list(self.batches.take(SEARCH_SEQUENCES))
        return Divergence(self.anatomy, self.matrices, dict(self.factors), search)

    def ranks(self, allocation: str, keep: float, settings: Mapping[str, Any], statistics: Any = None) -> Ranks:
        """Ranks of every matrix within `keep` of their bytes. statistics: for the scores of a sharing."""
        if is_ranking(allocation):
            measure = self.measure if needs_measure(allocation) and keep < 1 else None
            return allocate_ranks(allocation, self.tables, keep, measure, settings)
        scores = self.scores.of(allocation, statistics, settings)
        return ranks_of_shares(self.matrices, share_out(allocation, self.matrices, keep, scores, settings))


def ranks_of_shares(matrices: Sequence[Matrix], shares: Mapping[str, float]) -> Ranks:
    """The rank that each matrix's share pays for."""
    return {matrix.name: rank_of_share(matrix.name, matrix.shape, shares[matrix.name]) for matrix in matrices}
