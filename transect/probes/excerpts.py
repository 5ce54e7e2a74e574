"""A few short pieces of the text, for experiments that run the model many times on the same tokens."""

from __future__ import annotations

from torch import Tensor

from ..data import Specimen
from ..errors import NotApplicable


def excerpt(specimen: Specimen, count: int, length: int, least: int) -> Tensor:
    """Beginnings of sequences (at most count x length), shorter where the text or the model's context is shorter.

    least: raises NotApplicable where fewer tokens than this can be had. On the model's device.
    """
    lengths = map(len, specimen.text.texts())
    context = getattr(specimen.anatomy.config, "max_position_embeddings", None) or length
    available = min(length, context, max(lengths, default=0))
    if available < least:
        raise NotApplicable(
            f"it needs {least} tokens in one sequence; the text and the model's context give {available}"
        )
    return specimen.sequences(count, available).to(specimen.model.device)
