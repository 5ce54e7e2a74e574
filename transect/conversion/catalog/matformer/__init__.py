"""MatFormer (Devvrit et al., NeurIPS 2024, arXiv:2310.07707): MLPs whose first neurons are smaller MLPs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

import torch

from ....anatomy import Anatomy
from ...registry import Calibration, conversion
from ...stage import Stage
from .cut import matformer_cut as matformer_cut
from .nested import check_nested, narrowed
from .order import sort_neurons
from .widths import neurons_of, odds_of, shares_of


def _check(anatomy: Anatomy, widths: str, way: str, odds: str) -> None:
    shares = shares_of(widths, whole=True)
    odds_of(odds, len(shares))
    check_nested(anatomy)
    for share in shares:
        neurons_of(anatomy, share)


def _stages(widths: str, way: str, odds: str) -> list[Stage]:
    shares = shares_of(widths, whole=True)
    weights = torch.tensor(odds_of(odds, len(shares)))

    def within(anatomy: Anatomy, trained: bool) -> list[AbstractContextManager[None]]:
        chosen = shares
        if trained and way == "sampled":
            chosen = [shares[int(torch.multinomial(weights, 1))]]
        return [narrowed(anatomy, neurons_of(anatomy, share)) for share in chosen]

    return [Stage("matformer", train="full", lr=1e-4, within=within)]


@conversion(
    "matformer",
    paper="arXiv:2310.07707",
    group="nested and elastic models",
    exact="neurons only change places, so that it is the model as it was",
    check=_check,
    stages=_stages,
    causal=False,
)
def matformer(
    anatomy: Anatomy,
    calibration: Calibration,
    *,
    widths: str = "1/8,1/4,1/2,1",
    way: Literal["sampled", "joint"] = "sampled",
    odds: str = "",
) -> None:
    """The first neurons of every MLP become MLPs of their own, so that smaller models can be cut out (matformer-cut).

    Neurons are put in order of what they add to the stream on the text, root mean square times norm of their column in
    down; the paper begins with random weights, and the order is ours. Then all numbers of the blocks are trained, at
    each batch with one width in all blocks (Section 3.2), or with every width, the gradients summed (the released
    training; costs as many attentions as there are widths). Attention, norms and embeddings are shared, and the bias
    of down is whole at every width. A neuron that a batch leaves out has a gradient of zero, not none: moments and
    weight decay go on. The state kept is the best by the mean of the held-out losses of all widths.
    The rate is ours; the release fine-tunes at 1e-6 for 30,000 steps.

    widths: the shares of each MLP's neurons that are trained, rising; the last is 1.
    way: one width for a batch, drawn (each process draws its own), or all of them.
    odds: how often each width is drawn, such as 1,1,1,2; default alike.
    """
    sort_neurons(anatomy, calibration.batches, calibration.progress)
