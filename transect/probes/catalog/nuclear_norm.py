"""Matrix nuclear norm: how spread out the last states of a text are (Li et al., 2025, arXiv:2410.10672)."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor

from ...data import Specimen
from ...errors import NotApplicable, TransectError
from ...parameters import Range
from ..draw import Drawing, Table, scatter
from ..registry import Looking, probing
from ..result import Quantity, Result

_SAME = 1e-12  # a row nearer to the mean than this share of its length has no direction
_ABOUT = {
    "mnn": ("", "matrix nuclear norm over N: the sum of the min(N, d) largest column norms, over N"),
    "mnn_share": ("share", "MNN over its ceiling √(min(N, d) / N)"),
    "nuclear": ("", "nuclear norm over N: the sum of the singular values, over N"),
    "nuclear_share": ("share", "the same over its ceiling √(min(N, d) / N)"),
    "entropy": ("share", "matrix entropy over ln d"),
    "effective_rank": ("", "e to the matrix entropy"),
}


def draw(result: Result) -> list[Drawing]:
    """The plots of a result, from its arrays alone."""
    rows = [[name, round(float(result[name].nanmean()), 4), about] for name, (_, about) in _ABOUT.items()]
    return [
        scatter(
            "Estimate and exact value, text by text",
            "Both as a share of their ceiling. On a rising line the estimate ranks texts as the nuclear norm does.",
            {"texts": (result["nuclear_share"], result["mnn_share"])},
            xlabel="nuclear norm", ylabel="MNN",
        ),
        Table("Means over the texts", "A share of 1: all directions are used alike.", ["figure", "mean", "what"], rows),
    ]  # fmt: skip


@probing(
    "nuclear-norm", title="Spread of the last states", paper="arXiv:2410.10672", watches=["residual"], draw=draw
)  # fmt: skip
def nuclear_norm(specimen: Specimen, *, texts: Annotated[int, Range(1, 100_000)] = 64) -> Looking:
    """How spread out the last hidden states of a text are: matrix nuclear norm (MNN), its exact value, and entropy.

    X (N x d) are a text's states behind the final norm, minus their mean, each row over its length. MNN is the sum of
    the min(N, d) largest column norms of X, over N. The exact nuclear norm is the sum of its singular values; the
    matrix entropy is that of the eigenvalues of XᵀX / N. Both norms over N are at most √(min(N, d) / N); the figures as
    shares of that ceiling are ours. A text is one sequence, without padding; those of a single token are left out, and
    those whose states are all the same are NaN.
    Memory: one text's Gram matrix (min(N, d)²), float64. Time: one eigenvalue problem of that size a text.

    texts: how many texts to look at, from the first on.
    """
    rows: list[Tensor] = []
    lengths: list[int] = []
    short = width = 0
    while (seen := (yield)) is not None:
        states = seen.residual[specimen.layers]
        for number in range(len(states)):
            if len(rows) == texts:
                break
            one = states[number] if seen.mask is None else states[number][seen.mask[number]]
            if len(one) < 2:
                short += 1
                continue
            norm: Any = specimen.anatomy.final_norm
            with torch.no_grad():
                rows.append(figures(one if norm is None else norm(one)).cpu())
            lengths.append(len(one))
            width = one.shape[1]
    if not rows:
        raise NotApplicable("a text of one token has no spread: give sequences of at least two")
    table = torch.stack(rows)
    quantities = {
        name: Quantity(column, ("text",), *_ABOUT[name]) for name, column in zip(_ABOUT, table.T, strict=True)
    }
    quantities["length"] = Quantity(torch.tensor(lengths), ("text",), "tokens", "N")
    return Result(quantities, _findings(quantities, width), _caveats(lengths, width, table, short))


def figures(states: Tensor) -> Tensor:
    """The figures of `_ABOUT` in that order (6), float64, of a text's states R (N x d); NaN where rows coincide.

    Raises TransectError for fewer than two rows.
    """
    spread = normalised(states)
    count, width = spread.shape
    ceiling = (min(count, width) / count) ** 0.5
    gram = spread @ spread.T if count <= width else spread.T @ spread
    if not torch.isfinite(gram).all():
        return torch.full((len(_ABOUT),), float("nan"), dtype=torch.float64, device=states.device)
    values = torch.linalg.eigvalsh(gram).clamp_min(0)
    estimate, nuclear = matrix_nuclear_norm(spread), values.sqrt().sum() / count
    shares = values / count
    entropy = -torch.xlogy(shares, shares).sum()
    relative = entropy / torch.tensor(width, dtype=torch.float64).log()
    return torch.stack([estimate, estimate / ceiling, nuclear, nuclear / ceiling, relative, entropy.exp()])


def normalised(states: Tensor) -> Tensor:
    """X (N x d), float64: R minus its mean over tokens, then each row over its length; NaN where a row is the mean."""
    if states.dim() != 2 or states.shape[0] < 2:
        raise TransectError(f"expected the states of at least two tokens (N x d), got shape {tuple(states.shape)}")
    states = states.double()
    centred = states - states.mean(0)
    lengths = centred.norm(dim=1, keepdim=True)
    same = lengths <= _SAME * states.norm(dim=1, keepdim=True)
    return centred.div_(lengths.masked_fill_(same, float("nan")))


def matrix_nuclear_norm(spread: Tensor) -> Tensor:
    """MNN of X (N x d): the sum of its min(N, d) largest column norms, over N. O(N d)."""
    count, width = spread.shape
    lengths = spread.square().sum(0).sqrt()  # torch's own norm over columns takes three times as long
    return lengths.topk(min(count, width)).values.sum() / count


def _findings(quantities: dict[str, Quantity], width: int) -> list[str]:
    mean = {name: float(quantities[name].values.nanmean()) for name in _ABOUT}
    length = quantities["length"].values
    told = f"{int(length.min())}" if length.min() == length.max() else f"{int(length.min())} to {int(length.max())}"
    found = [
        f"Over {len(length)} texts of {told} tokens the last states (width {width}) have a matrix nuclear norm of "
        f"{mean['mnn']:.4f}, {mean['mnn_share']:.1%} of its ceiling. Lower reads as better compressed; compare only "
        "models that saw texts of the same length.",
        f"The exact nuclear norm is {mean['nuclear_share']:.1%} of its ceiling, and the states use "
        f"{mean['effective_rank']:.1f} directions of {width} (entropy {mean['entropy']:.3f} of ln {width}).",
    ]
    both = torch.stack([quantities["mnn_share"].values, quantities["nuclear_share"].values])
    both = both[:, both.isfinite().all(0)]
    if both.shape[1] >= 3 and bool((both.std(1) > 0).all()):
        found.append(
            "Across these texts the estimate and the exact value have a correlation of "
            f"{float(torch.corrcoef(both)[0, 1]):.2f}."
        )
    return found


def _caveats(lengths: list[int], width: int, table: Tensor, short: int) -> list[str]:
    caveats = [
        "MNN measures how evenly the coordinates vary, not how many directions are used: it changes under a rotation "
        "of the hidden space, which changes neither the nuclear norm nor the entropy, and hardly sees correlations."
    ]
    if min(lengths) < width:
        caveats.append(
            f"Some texts have fewer tokens than the {width} coordinates: then MNN is no bound on the nuclear norm, and "
            "its ceiling depends on the length."
        )
    if short:
        caveats.append(f"{short} texts of a single token were left out.")
    unknown = int(table[:, 0].isnan().sum())
    if unknown:
        caveats.append(f"{unknown} texts have coinciding states and are NaN; means leave them out.")
    return caveats
