"""Widths as a user writes them, and the mixtures of them that meet a budget."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from ....anatomy import MLP, Anatomy
from ....errors import TransectError


def shares_of(written: str, *, whole: bool = False) -> list[Fraction]:
    """Shares above 0 and up to 1 from a text such as "1/4,0.5,1"; TransectError for others.

    whole: they must rise, up to 1.
    """
    try:
        shares = [Fraction(piece.strip()) for piece in written.split(",")]
    except (ValueError, ZeroDivisionError):
        raise TransectError(f"widths should be shares written like 1/4,1/2,1, not {written!r}") from None
    if not all(0 < share <= 1 for share in shares):
        raise TransectError(f"widths should be shares above 0 and up to 1, not {written!r}")
    if whole and (shares != sorted(set(shares)) or shares[-1] != 1):
        raise TransectError(f"widths should rise, and the last be 1, the whole MLP; not {written!r}")
    return shares


def odds_of(written: str, count: int) -> list[float]:
    """A number of at least 0 for each of so many widths, all alike where nothing is written."""
    if not written.strip():
        return [1.0] * count
    try:
        odds = [float(Fraction(piece.strip())) for piece in written.split(",")]
    except (ValueError, ZeroDivisionError):
        odds = []
    if len(odds) != count or min(odds) < 0 or max(odds) == 0:
        raise TransectError(f"odds should be {count} numbers of at least 0, one for each width, not {written!r}")
    return odds


def mlps_of(anatomy: Anatomy) -> list[MLP]:
    """The MLP of every block; TransectError where one has none, a part, or experts."""
    found = []
    for block in anatomy.blocks:
        mlp = block.mlp
        if not isinstance(mlp, MLP):
            what = "a mixture of experts" if block.has_experts else "no MLP of the model's own"
            raise TransectError(f"block {block.index} has {what}: nested widths are those of an ordinary MLP")
        found.append(mlp)
    return found


def neurons_of(anatomy: Anatomy, shares: Fraction | Sequence[Fraction]) -> list[int]:
    """How many neurons of each block a share is, or the share of each; TransectError unless these are whole numbers."""
    mlps = mlps_of(anatomy)
    each = [shares] * len(mlps) if isinstance(shares, Fraction) else list(shares)
    found = []
    for mlp, share in zip(mlps, each, strict=True):
        count = share * mlp.neurons
        if count.denominator != 1:
            raise TransectError(
                f"block {mlp.block.index} has {mlp.neurons} neurons, of which {share} is no whole number: choose "
                "widths that divide it"
            )
        found.append(int(count))
    return found


def mixture(anatomy: Anatomy, trained: Sequence[Fraction], budget: float) -> list[Fraction]:
    """The share of each block for a budget: two neighbouring trained widths, the wider one behind (Section 3.3).

    trained: rising. budget: the most that is kept of the neurons of all blocks, of 1. So widths do not fall with depth
    and change once; as many of the last blocks have the wider one as the budget allows.
    """
    neurons = [mlp.neurons for mlp in mlps_of(anatomy)]
    allowed = Fraction(str(budget)) * sum(neurons)
    fitting = [number for number, share in enumerate(trained) if share * sum(neurons) <= allowed]
    if not fitting:
        raise TransectError(f"a budget of {budget:g} is less than the smallest trained width, {trained[0]}")
    at = fitting[-1]
    shares = [trained[at]] * len(neurons)
    if at + 1 < len(trained):
        for place in reversed(range(len(shares))):
            wider = [*shares[:place], trained[at + 1], *shares[place + 1 :]]
            if sum(share * count for share, count in zip(wider, neurons, strict=True)) > allowed:
                break
            shares = wider
    return shares
