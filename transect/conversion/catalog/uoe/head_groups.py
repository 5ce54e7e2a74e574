"""Trained attention cut into groups of heads: each group has its rows of q, k and v, and its columns of o."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ....anatomy import Anatomy
from ....anatomy.storage import dense
from ....errors import TransectError
from ....parts import insert
from ....parts.catalog.uoe.attention import check_head_groups
from ....parts.projection import Projection
from ...attention import check_is_softmax, put_projection, shape_of_outputs, trained_projections


def check_can_group(anatomy: Anatomy, layers: Sequence[int], groups: int, active: int) -> None:
    """TransectError unless attention in these blocks can be cut into so many groups of heads."""
    for number in layers:
        trained = trained_projections(anatomy.blocks[number])
        check_head_groups(trained.key_value_heads, groups, active)
        if any(isinstance(one, Projection) and one.norm == "all" for one in trained.shared.values()):
            raise TransectError(
                f"attention in block {number} norms the queries of all heads at once, so that no group of heads can "
                "run without the others: leave attention as it is (groups=0)"
            )
    check_is_softmax(anatomy, layers)


@torch.no_grad()
def put_head_groups(
    anatomy: Anatomy, layers: Sequence[int], groups: int, settings: Mapping[str, Any], seed: int = 0
) -> None:
    """Put the mixer of such groups into these blocks, with what their attention has learned, in place."""
    for number in layers:
        trained = trained_projections(anatomy.blocks[number])
        bias: Tensor | None = trained.shared["o"].bias  # type: ignore[assignment]
        given = {**settings, "experts": groups, "out_bias": bias is not None}
        insert(anatomy.model, "mixer", "uoe", layers=[number], settings=given, seed=seed + number)
        part = anatomy.blocks[number].part("attention")
        if bias is not None:
            part.out_bias.copy_(bias)
        path = f"{anatomy.blocks[number].slot_path('attention')}.part"
        for role, module in trained.shared.items():
            for group, piece in enumerate(_pieces(role, module, groups)):
                put_projection(anatomy, f"{path}.experts.{group}.{role}_proj", piece)


def _pieces(role: str, module: Any, groups: int) -> list[nn.Module]:
    """A projection in as many pieces: rows of q, k and v, columns of o (whose bias is not in them)."""
    if role == "o":
        return [dense(columns, None) for columns in module.weight.chunk(groups, dim=1)]
    size = shape_of_outputs(module) // groups
    return [_rows(module, slice(group * size, (group + 1) * size), groups) for group in range(groups)]


def _rows(module: Any, rows: slice, groups: int) -> nn.Module:
    """Whole heads of a projection."""
    if not isinstance(module, Projection):
        return dense(module.weight[rows], None if module.bias is None else module.bias[rows])
    linear = module.linear
    made = Projection(
        linear.in_features, module.heads // groups, module.head_size, linear.bias is not None, module.norm,
        module.centred, module.exponent, module.repeats,
    ).to(linear.weight)  # fmt: skip
    for held, stored in (
        (made.linear.weight, linear.weight), (made.linear.bias, linear.bias), (made.gain, module.gain),
        (made.shift, module.shift),
    ):  # fmt: skip
        if held is not None and stored is not None:
            held.copy_(stored[rows])
    return made
