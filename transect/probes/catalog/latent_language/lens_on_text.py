"""Running text through the logit lens, layer by layer: sums over tokens, so memory does not depend on the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ....forward import Lens
from ...neurons import wide
from ...result import Quantity

_ENTRIES = 2**22  # logits at once: more of them wait for memory


class LensSums:
    """What each of the states 0 ... L would predict, summed over tokens.

    kinds: names of kinds of tokens. index: the kind of each token id (V), or None where nobody can tell.
    """

    def __init__(self, lens: Lens, states: int, kinds: Sequence[str] = (), index: Tensor | None = None) -> None:
        self.lens, self.states, self.kinds, self.index = lens, states, list(kinds), index
        self.form = energy_form(lens)
        self.sums = torch.zeros(states, 4, dtype=torch.float64)  # entropy, divergence, rank, energy
        self.first = torch.zeros(states, dtype=torch.float64)
        self.mass = torch.zeros(states, len(self.kinds), dtype=torch.float64)
        self.count = 0

    def add(self, rows: Mapping[int, Tensor]) -> None:
        """rows: the states of some tokens, state -> n x d."""
        step = max(1, _ENTRIES // len(self.lens.weight))
        self.count += len(rows[0])
        for start in range(0, len(rows[0]), step):
            logs = self._predicted(rows[self.states - 1][start : start + step])
            final = logs.exp(), torch.linalg.vecdot(logs.exp(), logs), logs.argmax(-1, keepdim=True)
            for state in range(self.states):
                self._add(state, rows[state][start : start + step], final)

    def _predicted(self, part: Tensor) -> Tensor:
        """Log-probabilities of what some states predict (n x V); those of 0 are finite, so that 0 times them is 0."""
        logs = wide(self.lens(part)).log_softmax(-1)
        return logs.clamp_min_(torch.finfo(logs.dtype).min)

    def _add(self, state: int, part: Tensor, final: tuple[Tensor, Tensor, Tensor]) -> None:
        """final: behind the last block, the probabilities (n x V), Σ p log p (n) and the top token (n x 1)."""
        logs, (last, certainty, top) = self._predicted(part), final
        chances, dot = logs.exp(), torch.linalg.vecdot
        rank = (logs > logs.gather(-1, top)).sum(-1)
        self.sums[state] += torch.stack(
            [
                -dot(chances, logs).double().sum(), (certainty - dot(last, logs)).double().sum(),
                rank.double().sum(), energy(self.lens, self.form, part).double().sum(),
            ]
        ).cpu()  # fmt: skip
        self.first[state] += int((rank == 0).sum())
        if self.index is not None:
            self.mass[state].index_add_(0, self.index, chances.sum(0).double().cpu())

    def quantities(self) -> dict[str, Quantity]:
        """Means over tokens."""
        entropy, divergence, rank, energy = (self.sums / self.count).unbind(1)
        agreement = self.first / self.count
        found = {
            "entropy": Quantity(entropy, ("state",), "nats", "entropy of the prediction"),
            "divergence": Quantity(divergence, ("state",), "nats", "KL(final || layer)"),
            "rank": Quantity(rank, ("state",), "", "mean rank of the final layer's top token, 0 is the top"),
            "agreement": Quantity(agreement, ("state",), "share", "positions whose top token is already the last one"),
            "energy": Quantity(energy, ("state",), "", "token energy, 1 for a random state"),
        }
        if self.index is not None:
            mass = self.mass / self.count
            found["kinds"] = Quantity(mass, ("state", "kind"), "probability", "mass by kind of token")
        return found


def energy_form(lens: Lens) -> tuple[Tensor, float]:
    """Ŵᵀ Ŵ / V (d x d) of the unembedding with rows of length 1, and sqrt(mean cos²) between its rows."""
    gram = torch.zeros(lens.weight.shape[1], lens.weight.shape[1], device=lens.weight.device)
    for rows in lens.weight.split(2**16):
        normed = torch.nn.functional.normalize(rows.float(), dim=1)
        gram += normed.T @ normed
    gram /= len(lens.weight)
    return gram, float(gram.norm())


def energy(lens: Lens, form: tuple[Tensor, float], residual: Tensor) -> Tensor:
    """Token energy of states (n), in units of what a state in a random direction has."""
    normed = residual if lens.norm is None else lens.norm(residual)
    unit = torch.nn.functional.normalize(normed.float(), dim=-1)
    gram, scale = form
    energy = ((unit @ gram) * unit).sum(-1).clamp_min(0) / scale
    return (energy / (gram.trace() / len(gram) / scale)).sqrt()
