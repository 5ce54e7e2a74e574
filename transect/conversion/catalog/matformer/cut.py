"""Cutting smaller models out of a nested one."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any

from ....anatomy import Anatomy
from ....checkpoint.config import history_of
from ....errors import TransectError
from ...registry import Calibration, Range, conversion
from .nested import check_nested
from .widths import mixture, mlps_of, neurons_of, shares_of


def noted_widths(anatomy: Anatomy) -> list[Fraction]:
    """The shares that were trained, as the model's history has them; none where its MLPs were not nested, or cut since.

    Training afterwards, which names no other structure, leaves them.
    """
    config = anatomy.model.config  # where an ordinary checkpoint has kept it
    for entry in reversed([*history_of(vars(config), "the model's config"), *anatomy.record.history]):
        converted = entry.get("convert")
        if isinstance(converted, dict) and converted.get("method") == "matformer":
            return shares_of(converted["settings"]["widths"], whole=True)
        if converted is not None or "compress" in entry:
            return []
    return []


def _chosen(anatomy: Anatomy, width: str, budget: float, untrained: bool) -> list[Fraction]:
    """The share of each block."""
    trained, count = noted_widths(anatomy), len(mlps_of(anatomy))
    if not trained and not untrained:
        raise TransectError(
            "this model does not note that its MLPs are nested, and the first neurons of an ordinary MLP are no MLP: "
            "convert with matformer first, or set untrained"
        )
    if budget:
        return mixture(anatomy, trained or shares_of("1/8,1/4,1/2,1"), budget)
    shares = shares_of(width)
    if len(shares) not in (1, count):
        raise TransectError(f"width should be one share, or {count}, one for each block; {len(shares)} were given")
    if not untrained and (others := sorted(set(shares) - set(trained))):
        raise TransectError(
            f"the width {others[0]} was not trained, those are {', '.join(map(str, trained))}: choose among them, or "
            "set untrained"
        )
    return shares * (count if len(shares) == 1 else 1)


def _check(anatomy: Anatomy, **settings: Any) -> None:
    check_nested(anatomy)
    neurons_of(anatomy, _chosen(anatomy, **settings))


@conversion(
    "matformer-cut",
    paper="arXiv:2310.07707",
    group="nested and elastic models",
    exact="it is what the nested model computes with its first neurons, and with all of them the model as it was",
    check=_check,
    causal=False,
)
def matformer_cut(
    anatomy: Anatomy,
    calibration: Calibration,
    *,
    width: str = "1/2",
    budget: Annotated[float, Range(0, 1)] = 0.0,
    untrained: bool = False,
) -> None:
    """A smaller model out of one that was nested with matformer: the first neurons of every MLP, and all else.

    No training is needed. One width in all blocks was trained for as it is; different ones (Mix'n'Match, Section 3.3)
    were not, and lie between. Needs no data.

    width: a share of each MLP's neurons, or one for each block, such as 1/4,1/4,1/2,1.
    budget: in place of it, the most that is kept of all neurons: the last blocks get the wider of two neighbouring
        widths; 0 for none.
    untrained: also widths that were not trained, and models that were not nested, whose first neurons are any.
    """
    shares = _chosen(anatomy, width, budget, untrained)
    widths, mlps = neurons_of(anatomy, shares), mlps_of(anatomy)
    calibration.told["share of the neurons kept"] = sum(widths) / sum(mlp.neurons for mlp in mlps)
    calibration.told["blocks of a width that was not trained"] = len(
        [share for share in shares if share not in noted_widths(anatomy)]
    )
    for mlp, kept in zip(mlps, widths, strict=True):
        if kept < mlp.neurons:
            mlp.keep(range(kept))
