"""How far a compressed model's predictions are from the dense model's, on a few search sequences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..anatomy import Anatomy, Matrix
from ..forward import Batch, computing_wide, feeds_of, logits_at, put_out, run_block, run_blocks, to_device
from ..forward.objective import IGNORED, losses_of, targets_of, task_of
from .frame import apply_ranks, low_rank, temporarily
from .weighted_svd import Factorization

_TEMPERATURE = 0.6
_BURN_IN = 256  # predictions with little context say little about the model; half of a sequence's at most
_POSITIONS = 4096  # bounds the memory: this many rows of logits are kept
_AT_ONCE = 4096  # positions of all candidates that go through the blocks behind together


class Divergence:
    """Mean KL(dense || compressed) over positions, softmax of logits / 0.6 on both sides (LEMS, step 2).

    Of a model without a head, the mean relative squared error of its last hidden states.
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
        self._known_alone: dict[tuple[str, int, int], float] = {}
        self._of_states = task_of(anatomy.model) == "embedding"
        self._chosen = [self._compared(batch) for batch in self.batches]
        with torch.no_grad(), computing_wide(anatomy.model):
            self._dense = [  # log-probabilities or states at the compared positions, a tensor for each batch
                self._at(batch, chosen) for batch, chosen in zip(self.batches, self._chosen, strict=True)
            ]

    def _at(self, batch: Batch, chosen: Tensor) -> Tensor:
        parts = [self._seen(part) for part in logits_at(self.anatomy.model, batch, chosen)]
        return torch.cat(parts) if parts else torch.empty(0)  # nothing is compared in this batch

    def _compared(self, batch: Batch) -> Tensor:
        """At which positions (B x T) a batch's predictions are compared, or which examples (B)."""
        model = self.anatomy.model
        counted = targets_of(model, to_device(batch, model.device)) != IGNORED
        if counted.dim() == 2 and "labels" not in batch and not self._of_states:
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
        with computing_wide(model):
            total = sum(
                self._apart(dense, logits_at(model, batch, chosen))
                for batch, chosen, dense in zip(self.batches, self._chosen, self._dense, strict=True)
            )
        return max(total / sum(len(dense) for dense in self._dense), 0.0)

    def of_each(self, ranks: Mapping[str, int], predictions: int = _POSITIONS) -> dict[str, float]:
        """By matrix name, the divergence with that matrix alone at its rank.

        The blocks in front of the matrix are dense, so they are not run for it: its own block reads what the dense
        model gives it, and several candidates go through the blocks behind together. One sequence at a time.
        predictions: on the first sequences that have at least so many to compare.
        """
        keys = {name: (name, rank, predictions) for name, rank in ranks.items()}
        todo = [matrix for matrix in self.matrices if matrix.name in ranks]
        todo = [matrix for matrix in todo if keys[matrix.name] not in self._known_alone]
        operators = {matrix.name: low_rank(matrix, self.factors[matrix.name], ranks[matrix.name]) for matrix in todo}
        totals, count = dict.fromkeys(operators, 0.0), 0
        with torch.no_grad(), computing_wide(self.anatomy.model, *operators.values()):
            for batch, chosen, dense in self._sequences() if todo else ():
                count += len(dense)
                for name, hidden in self._ends(batch, todo, operators):
                    with put_out(self.anatomy, hidden):
                        totals[name] += self._apart(dense, logits_at(self.anatomy.model, batch, chosen))
                if count >= predictions:
                    break
        self._known_alone |= {keys[name]: max(total / count, 0.0) for name, total in totals.items()}
        return {name: self._known_alone[key] for name, key in keys.items()}

    def _sequences(self) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        """Each sequence as a batch of one, where it is compared, and what the dense model says there."""
        for batch, chosen, dense in zip(self.batches, self._chosen, self._dense, strict=True):
            start = 0
            for number, where in enumerate(chosen.split(1)):
                stop = start + int(where.sum())
                if stop > start:
                    yield {key: value[number : number + 1] for key, value in batch.items()}, where, dense[start:stop]
                start = stop

    def _ends(
        self, batch: Batch, matrices: Sequence[Matrix], operators: Mapping[str, Any]
    ) -> Iterator[tuple[str, Tensor]]:
        """By matrix name, what leaves the last block (1 x T x d) where the operator stands for that matrix alone."""
        anatomy = self.anatomy
        (feed,) = feeds_of(anatomy, [batch])
        hidden = feed.hidden
        for index, module in enumerate(anatomy.block_list):
            mine = [matrix for matrix in matrices if matrix.block.index == index]
            at_once = max(1, _AT_ONCE // hidden.shape[1])
            for start in range(0, len(mine), at_once):
                part, states = mine[start : start + at_once], []
                for matrix in part:
                    with temporarily(anatomy, [matrix]):
                        matrix.replace(operators[matrix.name])
                        states.append(run_block(module, hidden, feed.calls[index]))
                ends = run_blocks(anatomy, feed, index + 1, torch.cat(states))
                yield from zip((matrix.name for matrix in part), ends.split(1), strict=True)
            hidden = run_block(module, hidden, feed.calls[index])

    def _seen(self, logits: Tensor) -> Tensor:
        """Of logits the log-probabilities (n x V); hidden states (n x d) as they are."""
        return logits.float() if self._of_states else logits.float().div(_TEMPERATURE).log_softmax(-1)

    def _apart(self, dense: Tensor, logits: Iterable[Tensor]) -> float:
        """Sum of KL(dense || other), or of the error, over n positions. dense: see `_seen`. logits: in parts."""
        total, start = 0.0, 0
        for part in logits:
            own, other = dense[start : start + len(part)], self._seen(part)
            each = losses_of(other, own) if self._of_states else own.exp() * (own - other)
            total += each.sum().item()
            start += len(part)
        return total
