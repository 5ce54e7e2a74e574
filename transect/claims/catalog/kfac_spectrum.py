"""Claims about the spectrum of the loss's curvature (Merullo et al., arXiv:2510.24256)."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from torch import Tensor

from ...data import Passage
from ...probes.catalog.kfac_spectrum import BANDS, ROLES, band_loads, halves, passage_batches
from ...probes.curvature import curvature
from ..context import Context
from ..registry import NotApplicable, Result, Verdict, claim


@claim(
    "kfac-spectrum/recited-text-is-flat",
    method="kfac-spectrum",
    paper="arXiv:2510.24256",
    statement="Recited passages load on the flat directions of the curvature more than ordinary text does, and more "
    "than the same words in another order.",
)
def recited_text_is_flat(context: Context) -> Result:
    """Mean over the MLPs' inputs of the activation ratio, band by band. The words in another order are our control.

    It holds where the ratio rises from the top band to the bottom one, is above 1 there, and above the control's.
    """
    context.require_language_model()
    passages = context.specimen.passages
    recited, shuffled = _ratios(context, passages, _shuffled(passages))
    means = {name: one.mean(0).tolist() for name, one in (("recited", recited), ("shuffled", shuffled))}
    numbers = [
        {"band": band, "recited / text": a, "shuffled / text": b}
        for band, a, b in zip(BANDS, means["recited"], means["shuffled"], strict=True)
    ]
    rising = means["recited"] == sorted(means["recited"]) and means["recited"][-1] > 1
    above = int((recited[:, -1] > shuffled[:, -1]).sum())
    more = means["recited"][-1] > means["shuffled"][-1]
    return Result(
        Verdict.of(rising and more),
        f"Recited passages over text: {means['recited'][0]:.2f} in the top tenth of the directions, "
        f"{means['recited'][-1]:.2f} in the flat half. The same words in another order, which the model does not know: "
        f"{means['shuffled'][0]:.2f} and {means['shuffled'][-1]:.2f}; in the flat half the recited ones load more at "
        f"{above} of {len(recited)} inputs",
        numbers,
    )


def _ratios(context: Context, *kinds: Sequence[Passage]) -> list[Tensor]:
    """Activation ratios (inputs x bands) of each of these sets of passages over the calibration text."""
    specimen = context.specimen
    first, second = halves(list(specimen.text))
    if not second:
        raise NotApplicable("the calibration text is a single sequence")
    matrices = specimen.matrices(ROLES["mlp"])
    inputs = {matrix.source: matrix for matrix in matrices}
    found = curvature(specimen, matrices, first)
    bases = {source: found[matrix.name].vectors_in for source, matrix in inputs.items()}
    text, *others = (
        band_loads(specimen, inputs, bases, batches)[0]
        for batches in (second, *(passage_batches(specimen, passages) for passages in kinds))
    )
    return [lengths / text for lengths in others]


def _shuffled(passages: Sequence[Passage]) -> list[Passage]:
    """The passages with the words of each, prompt and ending together, in another order."""
    random, made = Random(0), []
    for passage in passages:
        words = [*passage.prompt.split(), *passage.answer.split()]
        random.shuffle(words)
        start = len(passage.prompt.split())
        made.append(Passage(" ".join(words[:start]), " ".join(words[start:])))
    return made
