"""How far a compressed model's predictions are from the dense model's, on a few search sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..anatomy import Anatomy, Matrix
from ..forward import Batch, computing_wide, logits_at, to_device
from ..forward.objective import IGNORED, targets_of
from .frame import apply_ranks, temporarily
from .weighted_svd import Factorization

_TEMPERATURE = 0.6
_BURN_IN = 256  # predictions with little context say little about the model; half of a sequence's at most
_POSITIONS = 4096  # bounds the memory: this many rows of logits are kept


class Divergence:
    """Mean KL(dense || compressed) over positions, softmax of logits / 0.6 on both sides (LEMS, step 2).

    Call it with ranks by matrix name; matrices that are not named are dense. Results are remembered, so that a
    search that asks for the same ranks again (for another budget, say) costs nothing.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        matrices: Sequence[Matrix],
        factors: Mapping[str, Factorization],
        batches: Sequence[Batch],
    ) -> None:
        self.anatomy, self.matrices, self.factors = anatomy, list(matrices), factors
        self.batches = list(batches)
        self._known: dict[frozenset[tuple[str, Any]], float] = {}
        self._dense = self._log_probabilities(anatomy.model)

    @torch.no_grad()
    def _log_probabilities(self, model: Any) -> list[Tensor]:
        found = []
        with computing_wide(model):
            for batch in self.batches:
                parts = logits_at(model, batch, self._chosen(model, batch))
                found += [part.float().div(_TEMPERATURE).log_softmax(-1) for part in parts]
        return found

    def _chosen(self, model: Any, batch: Batch) -> Tensor:
        """At which positions (B x T) a batch's predictions are compared, or which examples (B)."""
        counted = targets_of(model, to_device(batch, model.device)) != IGNORED
        if counted.dim() == 2 and "labels" not in batch:
            number, length = counted.long().cumsum(1) - 1, counted.sum(1, keepdim=True)
            counted = counted & (number >= (length // 2).clamp_max(_BURN_IN))
        places = counted.flatten().nonzero()[:, 0]
        chosen = torch.zeros_like(counted).flatten()
        chosen[places[:: max(1, -(-len(places) * len(self.batches) // _POSITIONS))]] = True
        return chosen.view_as(counted)

    @torch.no_grad()
    def __call__(self, ranks: Mapping[str, int | None]) -> float:
        key = frozenset((name, rank) for name, rank in ranks.items() if rank is not None)
        if key not in self._known:
            chosen = [matrix for matrix in self.matrices if ranks.get(matrix.name) is not None]
            with temporarily(self.anatomy, chosen):
                apply_ranks(chosen, self.factors, ranks)
                self._known[key] = self.of(self.anatomy.model)
        return self._known[key]

    @torch.no_grad()
    def of(self, model: Any) -> float:
        """Of any model with the same inputs and outputs."""
        pairs = list(zip(self._dense, self._log_probabilities(model), strict=True))
        total = sum((dense.exp() * (dense - other)).sum().item() for dense, other in pairs)
        return max(total / sum(len(dense) for dense, _ in pairs), 0.0)
