"""New directions for dead features (Bricken et al. 2023, "Towards Monosemanticity", as Kissane et al. 2024 do it)."""

from __future__ import annotations

import torch
from torch import Tensor

from .dictionary import Dictionary

CUTOFF = 1e-6  # share of the vectors; a feature that is active for no more of them is dead
SMALLER = 0.2  # length of a new encoder row, of the mean length of those of living features
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Firing:
    """For how many vectors each feature was active since the last resampling; what resuming needs of a training."""

    def __init__(self, dictionary: Dictionary) -> None:
        device = dictionary.decoder.device
        self.fired = torch.zeros(dictionary.features, dtype=torch.long, device=device)
        self.seen, self.steps = torch.zeros((), dtype=torch.long), torch.zeros((), dtype=torch.long)

    def add(self, a: Tensor) -> None:
        """Activations (n x F)."""
        self.fired += (a.detach() > 0).sum(0)
        self.seen += len(a)

    def dead(self) -> Tensor:
        """Which features are (F)."""
        return self.fired <= CUTOFF * self.seen.to(self.fired.device)

    def clear(self) -> None:
        """Count anew."""
        self.fired.zero_()
        self.seen.zero_()


@torch.no_grad()
def resample(
    dictionary: Dictionary, dead: Tensor, vectors: Tensor, optimizer: torch.optim.Optimizer, seed: int
) -> bool:
    """Point dead features at vectors that the dictionary reconstructs badly; whether there were such.

    dead: which of the features (F). vectors: n x D, scaled as in training. Vectors are drawn with a chance that goes
    with the square of their squared error, each at most once as long as there are enough. Then the decoder's column is
    x - b_dec at length 1; the encoder's row the same at a fifth of the mean length of the living ones' rows (of 1 where
    none lives); its bias 0. The optimizer forgets these rows and columns, and nothing else.
    """
    losses = (dictionary(vectors) - vectors).square().sum(1)
    if float(losses.max()) < 1e-6:
        return False
    chances = (losses / losses.max()).double().square().cpu()
    count = int(dead.sum())
    generator = torch.Generator().manual_seed(seed)
    enough = int((chances > 0).sum()) >= count
    # torch.multinomial takes 2^24 classes at most; what is in memory at once is less
    chosen = torch.multinomial(chances, count, replacement=not enough, generator=generator).to(vectors.device)
    directions = torch.nn.functional.normalize(vectors[chosen] - dictionary.decoder_bias, dim=1)
    alive = dictionary.encoder[~dead]
    length = float(alive.norm(dim=1).mean()) if len(alive) else 1.0
    dictionary.decoder[:, dead] = directions.T
    dictionary.encoder[dead] = SMALLER * length * directions
    dictionary.encoder_bias[dead] = 0
    for moment in _MOMENTS:
        for parameter, place in ((dictionary.encoder, dead), (dictionary.encoder_bias, dead),
                                 (dictionary.decoder, (slice(None), dead))):  # fmt: skip
            if moment in optimizer.state[parameter]:
                optimizer.state[parameter][moment][place] = 0
    return True
