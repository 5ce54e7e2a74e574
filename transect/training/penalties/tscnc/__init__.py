"""Small entries and well-conditioned matrices, for a network that will be pruned hard (TSCNC, Feng et al., 2025)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from ....parameters import Range
from ..registry import Seen, penalty
from .conditioning import FORMS
from .sparsity import transformed
from .weights import trained_weights

Form = Literal["spread", "normalized", "kappa", "raw"]


@penalty("tscnc", paper="arXiv:2503.20454")
def tscnc(
    seen: Seen,
    *,
    sparse: Annotated[float, Range(0)] = 1e-5,
    a: Annotated[float, Range(0, above=True)] = 1.0,
    sparse_in: str = "all",
    condition: Annotated[float, Range(0)] = 0.01,
    form: Form = "spread",
    condition_in: str = "all",
) -> Tensor:
    """Weights that are sparse and well conditioned: transformed L1 on their entries, and a flat spectrum.

    Adds sparse Σ_w (a + 1)|w| / (a + |w|) and condition Σ_W R(W). Where there is an adapter, W is the weight that it
    makes together with the layer; matrices in which nothing is trained do not count. TransectError where a layer is no
    matrix (experts by token), or nothing is trained in what is chosen.

    The paper's own R (`raw`, on the classifier alone) is (ln(1e-5 + det(G / q)))², with the smaller Gram matrix G
    (q x q). It controls a volume, not the condition number, which it can raise a lot; the other three are 0 for equal
    singular values alone (ours). Time for each matrix and batch: O(q² times its larger side), in float64.

    sparse: weight of the sum over entries; 0 for none. The gate-free form of the paper's penalty (ours).
    a: below the size of the entries it counts those that are not 0, far above it is plain L1. The paper's gates have
        100, of sums over channels.
    sparse_in: which matrices: all (of the blocks), or some of q, k, v, o, gate, up, down, head (the unembedding or
        classifier), with commas.
    condition: weight of each matrix's R; 0 for none. The paper has 1 for raw.
    form: spread, the log of the arithmetic over the geometric mean of the squared singular values; normalized, the raw
        form of q W / ‖W‖, which has hardly a gradient from q = 20 on; kappa, the log of the condition number; raw.
    condition_in: as sparse_in. The paper's is head.
    """
    terms = []
    if sparse:
        terms += [sparse * transformed(_wide(w).abs(), a).sum() for _, w in trained_weights(seen.model, sparse_in)]
    if condition:
        terms += [condition * FORMS[form](weight) for _, weight in trained_weights(seen.model, condition_in)]
    if not terms:
        return torch.zeros((), device=seen.model.device)
    return torch.stack([term.float() for term in terms]).sum()


def _wide(weight: Tensor) -> Tensor:
    return weight if weight.element_size() >= 4 else weight.float()
