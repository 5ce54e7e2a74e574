"""LLaVA-MoLE: a sparse mixture of low-rank experts in every MLP (Chen et al., 2024, arXiv:2401.16160).

Not to be taken for "Mixture of LoRA Experts" (arXiv:2404.13628), which learns gates over LoRAs trained before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from ....anatomy.storage import shape_of
from ...registry import Range, adapter
from ..lora import Positive, Rank, Share, of_pair
from .layer import MoleLayer
from .places import projections_of
from .tuner import MoleConfig, MoleModel

__all__ = ["MoleConfig", "MoleLayer", "MoleModel", "mole"]


def _counting(model: Any, paths: list[str], settings: Mapping[str, Any]) -> Callable[[int], int | None]:
    """E rank (d_out + d_in) of a projection, E (D + 1) of an MLP's router, rank (d_out + d_in) of every other layer."""
    experts, projections = settings["experts"], projections_of(model)
    shapes = {path: shape_of(model.get_submodule(path)) for path in paths}
    routers = {
        projections[path].mlp: shapes[path][1] for path in paths if path in projections and projections[path].reads
    }
    fixed = sum(experts * (width + 1) for width in routers.values()) if experts > 1 else 0
    pairs = sum(of_pair(*shapes[path], 1) * (experts if path in projections else 1) for path in paths)
    largest = min(min(shape) for shape in shapes.values())
    return lambda rank: fixed + rank * pairs if rank <= largest else None


@adapter(
    "mole", paper="arXiv:2401.16160", size="rank", numbers=of_pair, counting=_counting, merges=False,
)  # fmt: skip
def mole(
    paths: list[str], *, rank: Rank = 32, experts: Annotated[int, Range(1, 2**10)] = 3, alpha: Positive = 16.0,
    dropout: Share = 0.05, balance: Annotated[float, Range(0)] = 0.01, pooled: bool = False, soft: bool = False,
    gate_scale: bool = False,
) -> Any:  # fmt: skip
    """Several low-rank updates of every MLP, of which a router gives each token one; attention has a single one.

    The released code trains the router by the balance term alone. It cannot be merged, but for a single expert.

    rank: of every update.
    experts: updates of an MLP. With one there is no router, and it is LoRA.
    alpha: what scales the updates, divided by the rank.
    dropout: of what the updates read.
    balance: the weight of the term that spreads tokens evenly over experts.
    pooled: take that term over all layers of a sequence at once, as the released code does, not layer by layer.
    soft: all experts by their probability, at full cost; the loss then trains the router.
    gate_scale: the chosen expert's update times its probability, so that the loss trains the router (not in the paper).
    """
    return MoleConfig(
        rank=rank, experts=experts, alpha=alpha, dropout=dropout, balance=balance, pooled=pooled, soft=soft,
        gate_scale=gate_scale, target_modules=paths,
    )  # fmt: skip
