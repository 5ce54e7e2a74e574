"""What claims measure with: one model and its data, and every computation that several claims share, done once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..anatomy import Anatomy, Matrix
from ..compression import Factorization, Method, RankTable, Recipe
from ..compression import method as registered
from ..compression.allocation import check_keep, needs_measure
from ..compression.calibrate import calibrate
from ..compression.compress import SEARCH_SEQUENCES, choose_ranks
from ..compression.divergence import Divergence
from ..compression.frame import apply_ranks, describe_ranks, factorize, rank_table, temporarily
from ..compression.sequential import compress_in_order
from ..data import Batches
from ..errors import BadData, TransectError
from ..evaluation import evaluate_loss
from ..statistics import Progress, Statistic, Statistics, task_of
from .registry import NotApplicable


@dataclass(frozen=True)
class Variant:
    """A way to compress: a method (registered, or one that a claim defines for itself), its allocation, its refit."""

    method: Method
    allocation: str = "uniform"
    refit: bool = False

    @property
    def name(self) -> str:
        extras = [self.allocation] if self.allocation != "uniform" else []
        return " + ".join([self.method.name, *extras, *(["refit"] if self.refit else [])])


@dataclass(frozen=True)
class Measured:
    """Losses on the held-out sequences, one by one, so that two models can be compared in pairs.

    nats, predictions: (sequences), summed over a sequence. kept: share of the matrices' bytes.
    """

    nats: Tensor
    predictions: Tensor
    kept: float

    @property
    def loss(self) -> float:
        """Mean over all predictions, in nats."""
        return float(self.nats.sum() / self.predictions.sum())

    def minus(self, other: Measured) -> tuple[float, float]:
        """Difference of the two losses and its standard error over sequences (of the paired ratio estimate)."""
        total = self.predictions.sum()
        difference = (self.nats - other.nats).sum() / total
        residuals = self.nats - other.nats - difference * self.predictions
        count = len(residuals)
        error = (residuals.square().sum() * count / (count - 1)).sqrt() / total
        return float(difference), float(error)


class Context:
    """A model, its data, and what was computed from them so far. The model is as before after every call.

    calibration: `transect.data.Batches`, or None if there is no calibration data. evaluation: held-out `Batches`, of at
    least two sequences. uses: methods whose statistics are collected, in one pass, when the first of them is asked for.
    Factorizations stay in memory: about the size of the model's matrices for every method.
    """

    def __init__(
        self,
        model: Any,
        calibration: Batches | None,
        evaluation: Batches,
        uses: Iterable[str] = (),
        progress: Progress | None = None,
    ) -> None:
        if evaluation.examples < 2:
            raise BadData("claims compare models sequence by sequence: the held-out data has fewer than two")
        self.model, self.anatomy = model, Anatomy(model)
        self.evaluation, self.progress = evaluation, progress
        self.matrices: list[Matrix] = self.anatomy.matrices()
        self._calibration = calibration
        self._wanted: list[Statistic] = [statistic for name in uses for statistic in registered(name).needs]
        self._factors: dict[str, Mapping[str, Factorization]] = {}
        self._divergences: dict[str, Divergence] = {}
        self._measured: dict[tuple[Variant, float], Measured] = {}

    @property
    def calibration(self) -> Batches:
        """The calibration data; not applicable where there is none."""
        if self._calibration is None:
            raise NotApplicable("there is no calibration data")
        return self._calibration

    @cached_property
    def statistics(self) -> Statistics:
        """Of the dense model on the calibration data, for all methods in use."""
        return calibrate(self.anatomy, self.matrices, self._wanted, self.calibration, progress=self.progress)

    def require_language_model(self) -> None:
        """Not applicable unless the model predicts tokens."""
        if task_of(self.model) == "classification":
            raise NotApplicable(f"it is a claim about language models, and {type(self.model).__name__} is none")

    def require_keep(self, keep: float) -> None:
        """Not applicable where some matrix is too small for the budget."""
        try:
            check_keep(keep, {matrix.name: matrix.shape for matrix in self.matrices})
        except TransectError as error:
            raise NotApplicable(f"the model is too small: {error}") from None

    def factors(self, method: Method) -> Mapping[str, Factorization]:
        """Every matrix's factorization, by its name, with the method's default settings."""
        if method.name not in self._factors:
            statistics = self.statistics if method.needs else None
            settings = method.settings({})
            self._factors[method.name] = factorize(self.matrices, method, settings, statistics, self.progress)
        return self._factors[method.name]

    @cached_property
    def dense(self) -> Measured:
        """The loss of the model as it is."""
        return self._evaluate(1.0)

    def compressed(self, variant: Variant, keep: float) -> Measured:
        """The loss of the compressed model."""
        if (variant, keep) not in self._measured:
            self._measured[variant, keep] = self._compress_and_evaluate(variant, keep)
        return self._measured[variant, keep]

    def _compress_and_evaluate(self, variant: Variant, keep: float) -> Measured:
        self.require_keep(keep)
        factors = self.factors(variant.method)
        tables = [rank_table(matrix, factors[matrix.name]) for matrix in self.matrices]
        ranks = self._ranks(variant, keep, tables, factors)
        with temporarily(self.anatomy, self.matrices):
            if variant.refit:
                compress_in_order(
                    self.anatomy, self.matrices, variant.method, {}, ranks, list(self.calibration),
                    statistics=None, factors=factors, refit=True, progress=self.progress,
                )  # fmt: skip
            else:
                apply_ranks(self.matrices, factors, ranks)
            return self._evaluate(describe_ranks(tables, ranks)["kept"])

    def _ranks(
        self, variant: Variant, keep: float, tables: list[RankTable], factors: Mapping[str, Factorization]
    ) -> dict[str, int | None]:
        name, measure = variant.method.name, None
        if needs_measure(variant.allocation):
            if name not in self._divergences:
                search = list(self.calibration.take(SEARCH_SEQUENCES))
                self._divergences[name] = Divergence(self.anatomy, self.matrices, factors, search)
            measure = self._divergences[name]
        recipe = Recipe(name, keep, variant.allocation)
        return choose_ranks(self.anatomy, self.matrices, recipe, tables, factors, self._calibration, measure)

    def _evaluate(self, kept: float) -> Measured:
        nats, predictions = [], []
        for batch in self.evaluation:
            for row in range(len(next(iter(batch.values())))):
                one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
                try:
                    result = evaluate_loss(self.model, [one])
                except BadData:  # nothing to predict in it, such as a text's last token on its own
                    continue
                nats.append(result.loss * result.tokens)
                predictions.append(result.tokens)
        if len(nats) < 2:
            raise BadData("fewer than two held-out sequences hold something to predict")
        return Measured(torch.tensor(nats, dtype=torch.float64), torch.tensor(predictions, dtype=torch.float64), kept)
