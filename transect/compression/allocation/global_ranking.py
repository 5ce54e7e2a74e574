"""One ranking of all singular components of all matrices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .registry import Measure, ranking
from .table import Ranks, RankTable


@ranking("global")
def global_ranking(tables: Sequence[RankTable], keep: float, measure: Measure | None) -> Ranks:
    """Rank all singular components of all matrices by predicted loss increase per byte, and keep the best ones.

    Sensible where the method's objective means the same for every matrix: the loss itself (kfac-svd), less so the
    layer's own output error. Each matrix keeps rank 1 at least. Beyond some rank the dense matrix, without
    any loss, is the better buy than further components; that step competes like one large component. The loss of an
    expert of a mixture is that of a token which passes it, and counts as if all did.
    """
    budget = keep * sum(table.dense_bytes for table in tables)
    ranks: Ranks = {table.name: 1 for table in tables}
    left = budget - sum(table.bytes_per_rank for table in tables)
    gains, sizes, owners, targets = [], [], [], []
    for index, table in enumerate(tables):
        losses = table.losses.double().cpu().numpy()[: table.largest_rank + 1]
        steps = losses[1:-1] - losses[2:]  # gain of going from rank r to r + 1, r = 1 ...
        to_dense = losses[1:] / (table.dense_bytes - np.arange(1, len(losses)) * table.bytes_per_rank)
        # losses are convex in the rank, so the lower hull is: single steps up to some rank, then the jump to dense
        worth = steps / table.bytes_per_rank >= to_dense[:-1]
        stop = len(steps) if worth.all() else int(np.argmin(worth))  # steps on the hull
        gains += [*(steps[:stop] / table.bytes_per_rank), to_dense[stop], *(steps[stop:] / table.bytes_per_rank)]
        jump = table.dense_bytes - (stop + 1) * table.bytes_per_rank
        sizes += [*([table.bytes_per_rank] * stop), jump, *([table.bytes_per_rank] * (len(steps) - stop))]
        targets += [*range(2, stop + 2), 0, *range(stop + 2, len(steps) + 2)]  # 0 stands for dense
        owners += [index] * (len(steps) + 1)
    # Components past a matrix's hull only fill what a jump that did not fit has left: they come after all others.
    past_hull = np.zeros(len(gains), dtype=bool)
    seen_jump: set[int] = set()
    for position, (owner, target) in enumerate(zip(owners, targets, strict=True)):
        past_hull[position] = owner in seen_jump
        if target == 0:
            seen_jump.add(owner)
    for position in np.lexsort((-np.asarray(gains), past_hull)):
        table, target = tables[owners[position]], targets[position]
        current = ranks[table.name]
        if current is None or sizes[position] > left or (target and target != current + 1):
            continue  # dense already, too large, or a component before it was
        if not target and (table.dense_bytes - table.bytes_at(current)) > left:
            continue
        left -= table.dense_bytes - table.bytes_at(current) if not target else sizes[position]
        ranks[table.name] = target or None
    return ranks
