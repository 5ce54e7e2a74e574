"""What was lost and what was gained of facts and passages, by what each model says by itself."""

from __future__ import annotations

import torch

from ...errors import NotApplicable
from ...evaluation import says
from ...probes import Drawing, Result, Table
from ...probes.result import Quantity
from ..pair import Pair
from ..registry import comparing

_SHOWN = 60


def draw(result: Result) -> list[Drawing]:
    """The tables of a result."""
    drawn: list[Drawing] = []
    for kind in ("fact", "passage"):
        if f"{kind}s" not in result.quantities:
            continue
        said, names = result[f"{kind}s"], result.label(kind, len(result[f"{kind}s"]))
        for title, first, second in (("lost", True, False), ("gained", False, True)):
            rows = [(name,) for name, (a, b) in zip(names, said.tolist(), strict=True) if (a, b) == (first, second)]
            if rows:
                drawn.append(
                    Table(f"{kind.capitalize()}s {title}", f"{len(rows)} of {len(names)}.", (kind,), rows[:_SHOWN])
                )
    return drawn


@comparing("knowledge", title="What was lost and what was gained", draw=draw)
def knowledge(pair: Pair) -> Result:
    """Which facts and passages each model goes on with by itself, and which only one of them does.

    Free greedy generation, compared as text up to a word's end.
    """
    asked = {"fact": pair.known_facts, "passage": pair.known_passages}
    if not any(asked.values()):
        raise NotApplicable("it needs facts or passages: pass facts or passages (--facts, --passages; common are ours)")
    quantities, findings, labels = {}, [], {}
    for kind, questions in asked.items():
        if not questions:
            continue
        first, second = (says(one, questions) for one in (pair, pair.other))
        said = torch.tensor([first, second]).T
        quantities[f"{kind}s"] = Quantity(said, (kind, "model"), "", "whether each model says it by itself")
        labels[kind] = [
            f"{getattr(one, 'text', None) or one.prompt} {one.answer}"[:160]
            for one in questions  # type: ignore[union-attr]
        ]
        lost, gained = int((said[:, 0] & ~said[:, 1]).sum()), int((~said[:, 0] & said[:, 1]).sum())
        findings.append(
            f"Of {len(questions)} {kind}s the first says {sum(first)} and the second {sum(second)}: {lost} lost, "
            f"{gained} gained."
        )
    return Result(quantities, findings, labels={**labels, "model": ["first", "second"]})
