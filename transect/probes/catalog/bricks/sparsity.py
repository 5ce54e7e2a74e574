"""How small most activations of a token are, and what zeroing the smallest ones costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ....anatomy import Block
from ....data import Specimen
from ....evaluation import evaluate_loss
from ....forward import changed
from ....forward.change import Change
from ...neurons import output_norms, wide

INDICATORS = ("activation", "output")  # |a_i|, and |a_i| times the length of what the neuron writes
RANDOM = "random"
LEVELS = torch.arange(1, 21) / 20  # of the indicator over its largest in that token and layer
MASKED = (0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0)


class Sizes:
    """Counts over tokens of one layer: how many neurons' indicator is at most each level of the token's largest."""

    def __init__(self, block: Block) -> None:
        self.norms = output_norms(block)  # n
        self.counts = torch.zeros(len(INDICATORS), len(LEVELS), dtype=torch.float64)
        self.total = 0

    def add(self, activations: Tensor) -> None:
        """activations: tokens x n."""
        a = wide(activations).abs()
        self.total += a.numel()
        for number, sizes in enumerate((a, a * self.norms.to(a))):
            largest = sizes.amax(-1, keepdim=True)
            relative = sizes / largest.clamp_min(torch.finfo(sizes.dtype).tiny)
            bins = torch.bucketize(relative, LEVELS.to(relative)).flatten().clamp_max(len(LEVELS) - 1)
            self.counts[number] += bins.bincount(minlength=len(LEVELS)).cpu()

    @property
    def shares(self) -> Tensor:
        """Share of the neurons at or below each level (indicator x level), mean over tokens."""
        return self.counts.cumsum(-1) / max(1, self.total)


def without_smallest(activations: Tensor, sizes: Tensor, number: int) -> Tensor:
    """The activations (... x n) with the `number` entries of each token whose sizes are smallest at zero.

    sizes: of the same shape. Of equal ones some are chosen, so that it is always so many.
    """
    if number < 1:
        return activations
    places = sizes.topk(number, largest=False, sorted=False).indices
    return activations.scatter(-1, places, 0)


def masked_losses(specimen: Specimen, blocks: Sequence[Block], sequences: int) -> Tensor:
    """Loss (nats) by what decides, activation, output or chance (3), and by the share of neurons at zero (see MASKED).

    Of every token and layer the same share goes, so that it is a pass for each; the text is its first sequences.
    """
    text = specimen.text.take(sequences)
    norms = {block.index: output_norms(block) for block in blocks}
    table = torch.zeros(len(INDICATORS) + 1, len(MASKED), dtype=torch.float64)
    cases = [(way, place) for place in range(len(MASKED)) for way in range(len(table))]
    for way, place in specimen.shown(cases, "smallest neurons at zero"):
        if MASKED[place] in (0.0, 1.0) and way:
            table[way, place] = table[0, place]  # all of them, or none: the same whatever decides
            continue
        with changed(specimen.anatomy, changes(norms, way, MASKED[place], specimen.seed)):
            table[way, place] = evaluate_loss(specimen.model, text).loss
    return table


def changes(norms: Mapping[int, Tensor], way: int, share: float, seed: int) -> dict[tuple[str, int], Change]:
    """What zeroes this share of every layer's neurons. norms: by layer (n). way: as in `masked_losses`."""
    generator = torch.Generator().manual_seed(seed)

    def thinned(norm: Tensor) -> Change:
        def change(a: Tensor) -> Tensor:
            if way == len(INDICATORS):
                sizes = torch.rand(a.shape, generator=generator).to(a.device)
            else:
                sizes = wide(a).abs() * (norm.to(a.device) if way else 1)
            return without_smallest(a, sizes, round(share * a.shape[-1]))

        return change

    return {("neurons", layer): thinned(norm) for layer, norm in norms.items()}


def below(shares: Tensor, level: float) -> Tensor:
    """Of shares by level (... x levels), those at one level."""
    return shares[..., int((LEVELS - level).abs().argmin())]


def costless(losses: Iterable[float], allowed: float) -> float:
    """The largest share at zero up to which the loss never rises by more than `allowed` nats."""
    values, best = list(losses), 0.0
    for share, loss in zip(MASKED, values, strict=True):
        if loss - values[0] > allowed:
            break
        best = share
    return best
