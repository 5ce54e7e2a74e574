"""Whether the last layer pulls a right answer back towards frequent tokens, and what turning it down does.

Lv et al., arXiv:2403.19521, report the pull. How it is measured and undone here is our design.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ....data import Fact, Specimen
from ....errors import NotApplicable
from ....forward import Lens, answer_log_probabilities, changed

FACTORS = (1.0, 0.75, 0.5, 0.25, 0.0)


def last_mlp(specimen: Specimen) -> int:
    """The last layer that has an MLP."""
    layers = [layer for layer, block in enumerate(specimen.anatomy.blocks) if block.mlp is not None]
    if not layers:
        raise NotApplicable("the model has no MLP left")
    return layers[-1]


def frequent_direction(specimen: Specimen, lens: Lens) -> Tensor | None:
    """The direction of the stream (d, float64, length 1) that raises frequent tokens; None where there is no text.

    Sum of p_v W_U[v] - mean of W_U over the vocabulary, with p the frequencies of tokens in the text, times the final
    norm's gain, which stands between the stream and W_U.
    """
    if specimen.data is None:
        return None
    counts = torch.zeros(len(lens.weight), dtype=torch.float64)
    for ids in specimen.data.texts():
        counts += ids.cpu().bincount(minlength=len(counts))[: len(counts)]
    weight = lens.weight.cpu()
    mean = weight.mean(0, dtype=torch.float64)
    direction = sum(
        (p[:, None] * rows.double()).sum(0) for p, rows in zip(counts.split(4096), weight.split(4096), strict=True)
    )
    direction = (direction / counts.sum() - mean) * lens.gain.detach().double().cpu()
    return direction / direction.norm()


def fixes(direction: Tensor | None) -> dict[str, Callable[[Tensor], Tensor]]:
    """By name, changes of the last MLP's output: times a factor, or without the direction of frequent tokens."""

    def times(factor: float) -> Callable[[Tensor], Tensor]:
        return lambda x: factor * x

    made = {f"{factor:g}": times(factor) for factor in FACTORS}
    if direction is not None:
        made["without the frequent direction"] = lambda x: x - (x @ direction.to(x))[..., None] * direction.to(x)
    return made


def answer_probabilities(
    specimen: Specimen, facts: Sequence[Fact], changes: Mapping[str, Callable[[Tensor], Tensor]]
) -> Tensor:
    """Probability of each fact's answer under each change of the last MLP (changes x facts), float64."""
    layer = last_mlp(specimen)
    pairs = [(specimen.encode(fact.text), specimen.continuation(fact.text, fact.answer)) for fact in facts]
    rows = []
    for change in changes.values():
        with changed(specimen.anatomy, {("mlp", layer): change}):
            rows.append(answer_log_probabilities(specimen.model, pairs).exp())
    return torch.stack(rows)
