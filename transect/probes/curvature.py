"""The curvature of the loss in a weight matrix, as K-FAC sees it: factors, eigenbases, and pairs of directions.

For y = W x the Fisher information of W (d_out x d_in) is nearly G ⊗ A, with A = E[x xᵀ] and G = E[g gᵀ], g the gradient
of the loss with respect to y. With eigenpairs (λ_i, u_i) of G and (μ_j, v_j) of A, the loss bends by λ_i μ_j along the
direction u_i v_jᵀ of weight space (Merullo et al., 2025, arXiv:2510.24256, after Martens and Grosse, 2015).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..anatomy import Anatomy, ExpertMatrix, Matrix
from ..data import Specimen
from ..errors import BadData, NotApplicable, TransectError
from ..forward import Batch, at_rest, backpropagate, real_positions, task_of
from ..forward.objective import IGNORED, targets_of, to_device
from ..statistics import InputCovariance, OutputGradientCovariance, Recorder, Statistics, key_of
from ..statistics.collect import gradients_from, loss_for_gradients

_INPUT, _OUTPUT = InputCovariance(), OutputGradientCovariance()


@dataclass(frozen=True)
class Curvature:
    """Eigenpairs of both factors of one matrix W (d_out x d_in), eigenvalues falling and at least 0, float64.

    values_out (d_out), vectors_out (d_out x d_out): of G = E[g gᵀ]; column i is u_i.
    values_in (d_in), vectors_in (d_in x d_in): of A = E[x xᵀ], uncentred; column j is v_j.
    positions: over how many tokens (or patches) the expectations were taken.
    """

    values_out: Tensor
    vectors_out: Tensor
    values_in: Tensor
    vectors_in: Tensor
    positions: int

    @property
    def products(self) -> Tensor:
        """λ_i μ_j, the curvature along u_i v_jᵀ (d_out x d_in)."""
        return self.values_out[:, None] * self.values_in

    def coefficients(self, weight: Tensor) -> Tensor:
        """C = U_Gᵀ W U_A (d_out x d_in), float64: how much of each direction u_i v_jᵀ is in W."""
        return self.vectors_out.T @ weight.to(self.vectors_out) @ self.vectors_in

    def matrix(self, coefficients: Tensor) -> Tensor:
        """W = U_G C U_Aᵀ (d_out x d_in), float64."""
        return self.vectors_out @ coefficients @ self.vectors_in.T


def curvature(
    specimen: Specimen, matrices: Sequence[Matrix], batches: Iterable[Batch] | None = None
) -> dict[str, Curvature]:
    """The curvature of the loss in each of the matrices, by `matrix.name`.

    One forward and backward pass over the batches (default: the specimen's text), in the model's own precision; the
    sums are float64. The labels are drawn from the model's own predictions with the specimen's seed (the true Fisher).
    The last position of a causal model's sequences is left out of both factors, since it predicts nothing; padding is
    left out, too. An input that several matrices share is collected and decomposed once.
    Memory: 2 (d_in² + d_out²) float64 numbers a matrix. Time: O(d_in³ + d_out³) for the eigenvectors.
    Raises NotApplicable without text, or for a model with another objective whose batches bring no labels; BadData
    where nothing is predicted; TransectError for non-finite activations, or a matrix that the loss does not depend on.
    """
    batches = list(specimen.text if batches is None else batches)
    statistics = factors(specimen, matrices, batches)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    found = {}
    for matrix in specimen.shown(matrices, "eigenvectors"):
        key = key_of(matrix, _INPUT)
        if key not in seen:
            seen[key] = eigenpairs(statistics.value(key, _INPUT), f"the inputs of {matrix.name}")
        outputs = eigenpairs(statistics.value(matrix.name, _OUTPUT), f"the output gradients of {matrix.name}")
        found[matrix.name] = Curvature(*outputs, *seen[key], _positions(statistics, matrix))
    return found


def factors(specimen: Specimen, matrices: Sequence[Matrix], batches: Sequence[Batch]) -> Statistics:
    """A and G of the matrices, as statistics in float64; see `curvature`."""
    anatomy, model = specimen.anatomy, specimen.model
    if any(isinstance(matrix, ExpertMatrix) for matrix in matrices):
        raise NotApplicable(
            f"the MLPs of {type(model).__name__} are mixtures of experts, which see too few positions each for their "
            "curvature; the attention matrices have one"
        )
    task = task_of(model)
    if task == "unknown":
        raise NotApplicable(f"{type(model).__name__} has no head whose loss is known here")
    if task not in ("causal", "embedding") and any("labels" not in batch for batch in batches):
        raise NotApplicable(f"{type(model).__name__} has no loss without labels: pass batches that have them")
    store = Statistics(torch.float64)
    drawn = loss_for_gradients(model, "sampled", specimen.seed)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        if not torch.isfinite(logits).all():
            raise TransectError("the model's logits are not finite: repair its weights, or use float32")
        return drawn(logits, labels)

    with at_rest(model, frozen=True), Recorder(matrices, [_INPUT, _OUTPUT], store, task) as recorder:
        for batch in specimen.shown(batches, "curvature"):
            mask = counted_positions(anatomy, batch)
            if mask is not None and not mask.any():
                continue  # sequences of one token predict nothing
            recorder.begin_batch(len(next(iter(batch.values()))), mask)
            with gradients_from(anatomy.embedding):
                backpropagate(model, batch, loss)
    if matrices and _positions(store, matrices[0]) == 0:
        raise BadData("no sequence of the text predicts anything: each needs at least two tokens")
    store.check_finite()
    return store


def _positions(store: Statistics, matrix: Matrix) -> int:
    return int(store.sums(key_of(matrix, _INPUT), _INPUT, matrix.shape, matrix.module)["count"])


def counted_positions(anatomy: Anatomy, batch: Batch) -> Tensor | None:
    """Which positions (B x T) are neither padding nor, in a causal model, without a next token. None: all."""
    model = anatomy.model
    batch = to_device({name: tensor for name, tensor in batch.items() if name != "labels"}, model.device)
    return targets_of(model, batch) != IGNORED if task_of(model) == "causal" else real_positions(batch)


def eigenpairs(factor: Tensor, what: str = "the factor") -> tuple[Tensor, Tensor]:
    """Eigenvalues (n), falling and clamped at 0, and eigenvectors (n x n, as columns) of a symmetric matrix, float64.

    Raises TransectError where it is zero or not finite.
    """
    factor = factor.double()
    if not torch.isfinite(factor).all() or float(factor.trace()) <= 0:
        raise TransectError(
            f"the second moment of {what} is zero or not finite: there is no curvature to see there; "
            "give more text, or choose other matrices"
        )
    values, vectors = torch.linalg.eigh(factor)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def kept_pairs(values_out: Tensor, values_in: Tensor, share: float) -> Tensor:
    """The fewest pairs (i, j) that hold `share` of the curvature mass Σ λ_i Σ μ_j, as a mask (d_out x d_in).

    Those of the largest λ_i μ_j: not a rectangle. share 1 keeps every pair, those of no curvature included.
    values_out (d_out), values_in (d_in): eigenvalues in any order, at least 0. The masks of rising shares are nested.
    Raises TransectError for a share outside (0, 1], negative or non-finite values, or no mass at all.
    """
    if not 0 < share <= 1:
        raise TransectError(f"the share of curvature mass to keep must be above 0 and at most 1, got {share}")
    products = (values_out.double()[:, None] * values_in.double()).flatten()
    negative = bool((values_out < 0).any()) or bool((values_in < 0).any())
    if negative or not torch.isfinite(products).all() or not products.any():
        raise TransectError("eigenvalues must be finite, at least 0, and not all 0")
    kept = torch.ones_like(products, dtype=torch.bool)
    if share < 1:
        ordered, order = products.sort(descending=True, stable=True)
        mass = ordered.cumsum(0)
        count = int(torch.searchsorted(mass, share * mass[-1])) + 1
        kept[order[count:]] = False
    return kept.view(len(values_out), len(values_in))
