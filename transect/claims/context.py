"""What claims measure with: one model and its data, and every computation that several claims share, done once."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..anatomy import Anatomy, Matrix
from ..compression import Factorization, Method, Recipe, allocation_named, compress_anatomy
from ..compression import method as registered
from ..compression.allocation import Scores
from ..compression.calibrate import calibrate
from ..compression.compress import outcome_of, run_compressor
from ..compression.compressors import RankCompressor
from ..compression.copying import working_copy
from ..compression.factorized import Factorized, ranks_of_shares
from ..compression.frame import factorize, temporarily
from ..data import Batches, Specimen
from ..errors import BadData, NotApplicable, OutOfReach
from ..evaluation import evaluate_loss
from ..forward import task_of
from ..statistics import Progress, Statistic, Statistics


@dataclass(frozen=True)
class Variant:
    """A way to compress: a method (registered, or one that a claim defines for itself), its allocation, its refit.

    allocation: empty for the method's own default.
    settings: (name, value) of each parameter that is not at its default.
    """

    method: Method
    allocation: str = ""
    refit: bool = False
    settings: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "allocation", self.allocation or self.method.allocation)

    @property
    def name(self) -> str:
        """What tables and explanations call it."""
        chosen = [f"{name}={value}" for name, value in self.settings]
        extras = [self.allocation] if self.allocation != "uniform" else []
        return " + ".join([" ".join([self.method.name, *chosen]), *extras, *(["refit"] if self.refit else [])])


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
    least two sequences. specimen: the model with its tokenizer, the calibration text and the questions about what it
    knows, for claims about probes and edits. uses: methods whose statistics are collected, in one pass, when the
    first of them is asked for.
    shared: what the claims of a method compute together, by its name.
    keeps: budgets at which claims compare, in the place of their own; see `budgets`.
    Factorizations stay in memory: about the size of the model's matrices for every method.
    """

    def __init__(
        self,
        model: Any,
        calibration: Batches | None,
        evaluation: Batches,
        uses: Iterable[str] = (),
        progress: Progress | None = None,
        specimen: Specimen | None = None,
        keeps: Sequence[float] = (),
    ) -> None:
        if evaluation.examples < 2:
            raise BadData("claims compare models sequence by sequence: the held-out data has fewer than two")
        self.model, self.anatomy = model, Anatomy(model)
        self.evaluation, self.progress = evaluation, progress
        self.matrices: list[Matrix] = self.anatomy.matrices()
        self._calibration = calibration
        self.specimen = specimen or Specimen(self.anatomy, data=calibration, progress=progress)
        self._wanted: list[Statistic] = [statistic for name in uses for statistic in registered(name).needs]
        self._factors: dict[str, Mapping[str, Factorization]] = {}
        self._by_method: dict[str, Factorized] = {}
        self._scores = Scores(self.matrices)
        self._measured: dict[tuple[Variant, float], Measured] = {}
        self.shared: dict[str, Any] = {}
        self.keeps = tuple(keeps)

    def budgets(self, usual: Sequence[float]) -> tuple[float, ...]:
        """The shares of the bytes at which a claim compares: those that were asked for, or its own."""
        return self.keeps or tuple(usual)

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

    def fresh(self) -> Specimen:
        """The specimen on a float32 copy of the model, to be changed."""
        copied = copy.deepcopy(self.model).float()
        return replace(self.specimen, anatomy=Anatomy(copied, self.anatomy.architecture))

    def require_language_model(self) -> None:
        """Not applicable unless the model predicts tokens."""
        if task_of(self.model) == "classification":
            raise NotApplicable(f"it is a claim about language models, and {type(self.model).__name__} is none")

    def require_keep(self, keep: float) -> None:
        """Not applicable where some matrix is too small for the budget."""
        try:
            ranks_of_shares(self.matrices, {matrix.name: keep for matrix in self.matrices})
        except OutOfReach as error:
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
        return self.evaluate(self.model, 1.0)

    def compressed(self, variant: Variant, keep: float) -> Measured:
        """The loss of the compressed model."""
        if (variant, keep) not in self._measured:
            self._measured[variant, keep] = self._compress_and_evaluate(variant, keep)
        return self._measured[variant, keep]

    def _compress_and_evaluate(self, variant: Variant, keep: float) -> Measured:
        if variant.method.family != "factorization" or variant.settings:
            return self._compress_a_copy(variant, keep)
        self.require_keep(keep)
        factorized = self._factorized(variant.method)
        ranks = factorized.ranks(variant.allocation, keep, {}, self._statistics_for(variant))
        compressor = RankCompressor(variant.method, {}, ranks, factorized.factors)
        roles, dense_bytes = None, self.anatomy.matrix_bytes()
        recipe = Recipe(variant.method.name, keep, variant.allocation, refit=variant.refit)
        with temporarily(self.anatomy, self.matrices):
            run_compressor(self.anatomy, self.matrices, recipe, compressor, None, self._calibration)
            return self.evaluate(self.model, outcome_of(self.anatomy, roles, dense_bytes)["kept"])

    def _compress_a_copy(self, variant: Variant, keep: float) -> Measured:
        """For methods that do more than truncate; a budget that is out of their reach makes a claim not applicable."""
        anatomy = working_copy(self.anatomy)
        recipe = Recipe(
            variant.method.name, keep, variant.allocation, dict(variant.settings), refit=variant.refit
        )  # fmt: skip
        try:
            recipe.resolved(anatomy, anatomy.matrices())
            statistics = self._statistics_for(variant)
            outcome = compress_anatomy(
                anatomy, recipe, self._calibration, statistics=statistics, scores=self._scores, progress=self.progress
            )
        except OutOfReach as reason:  # by its shares, or by those that the scores give
            raise NotApplicable(str(reason)) from None
        return self.evaluate(anatomy.model, outcome["kept"])

    def _statistics_for(self, variant: Variant) -> Statistics | None:
        needed = [*variant.method.needs, *allocation_named(variant.allocation).needs]
        missing = [statistic for statistic in dict.fromkeys(needed) if statistic not in self._wanted]
        if missing:  # what only an allocation needs: a pass of its own
            self.statistics.merge(calibrate(self.anatomy, self.matrices, missing, self.calibration))
            self._wanted += missing
        return self.statistics if needed else None

    def _factorized(self, method: Method) -> Factorized:
        if method.name not in self._by_method:
            factors = self.factors(method)
            self._by_method[method.name] = Factorized(
                self.anatomy, self.matrices, factors, self._calibration, self._scores
            )  # fmt: skip
        return self._by_method[method.name]

    def evaluate(self, model: Any, kept: float) -> Measured:
        """The loss of any model, sequence by sequence. kept: share of the matrices' bytes that it has."""
        nats, predictions = [], []
        for batch in self.evaluation:
            for row in range(len(next(iter(batch.values())))):
                one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
                try:
                    result = evaluate_loss(model, [one])
                except BadData:  # nothing to predict in it, such as a text's last token on its own
                    continue
                nats.append(result.loss * result.tokens)
                predictions.append(result.tokens)
        if len(nats) < 2:
            raise BadData("fewer than two held-out sequences hold something to predict")
        return Measured(torch.tensor(nats, dtype=torch.float64), torch.tensor(predictions, dtype=torch.float64), kept)
