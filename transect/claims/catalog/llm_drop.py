"""Claims of LLM-Drop (He et al., 2024, arXiv:2406.15786)."""

from __future__ import annotations

import torch

from ...compression import method as registered
from ...compression.catalog.llm_drop import remove, units_of
from ...compression.copying import working_copy
from ...statistics import SublayerSimilarity
from ..context import Context, Measured, Variant
from ..controls import mean_of
from ..ordering import comparison, judge, ordered_at
from ..registry import NotApplicable, Result, Verdict, claim

LLM_DROP = registered("llm-drop")
KINDS = ("attention", "mlp", "block")
_DRAWS = 5


def dropped(kind: str, count: int) -> Variant:
    """LLM-Drop of so many units of one kind."""
    return Variant(LLM_DROP, settings=(("variant", kind), ("drop", count)))


def quarter(context: Context) -> int:
    """n = L / 4, at least 1; not applicable to a model whose sublayers cannot go, or of a single block."""
    context.require_language_model()
    blocks = context.anatomy.blocks
    if blocks[0].post_norm:
        raise NotApplicable(f"{type(context.model).__name__} normalises after the residual sum: no sublayer can go")
    if len(blocks) < 2:
        raise NotApplicable("the model has a single block")
    return max(1, len(blocks) // 4)


@claim(
    "llm-drop/attention-first",
    method="llm-drop",
    paper=LLM_DROP.paper,
    statement="Dropping a quarter of the attention sublayers loses less than dropping as many MLP sublayers, and that "
    "less than dropping as many blocks.",
    uses=["llm-drop"],
)
def attention_first(context: Context) -> Result:
    """The paper's headline. The same number of units, which is not the same number of bytes."""
    attention, mlp, block = (dropped(kind, quarter(context)) for kind in KINDS)
    return ordered_at(context, [1.0], (attention, mlp), (mlp, block))


@claim(
    "llm-drop/below-random",
    method="llm-drop",
    paper=LLM_DROP.paper,
    statement="Dropping the units of highest similarity loses less than dropping as many random ones.",
    uses=["llm-drop"],
)
def below_random(context: Context) -> Result:
    """A quarter of the attention sublayers, of the MLP sublayers and of the blocks, against the mean of five draws."""
    count = quarter(context)
    found = []
    for kind in KINDS:
        chosen = context.compressed(dropped(kind, count), 1.0)
        drawn = mean_of([at_random(context, kind, count, draw) for draw in range(_DRAWS)])
        found.append(comparison(1.0, (f"llm-drop {kind}", chosen), (f"random {kind}", drawn)))
    return judge(found)


def at_random(context: Context, kind: str, count: int, draw: int) -> Measured:
    """The loss without `count` random units."""
    anatomy = working_copy(context.anatomy)
    whole, units = anatomy.matrix_bytes(), units_of(anatomy, kind)
    order = torch.randperm(len(units), generator=torch.Generator().manual_seed(draw)).tolist()
    remove(anatomy, [sublayer for index in order[:count] for sublayer in units[index]])
    return context.evaluate(anatomy.model, anatomy.matrix_bytes() / whole)


@claim(
    "llm-drop/where-it-is-redundant",
    method="llm-drop",
    paper=LLM_DROP.paper,
    statement="Attention turns the residual stream less than MLPs do, and less in the second half of the blocks than "
    "in the first two.",
    uses=["llm-drop"],
)
def where_it_is_redundant(context: Context) -> Result:
    """By the mean similarity; in a model of fewer than four blocks, the second half against the first."""
    quarter(context)
    blocks = context.anatomy.blocks
    values = torch.stack([context.statistics.value(f"blocks.{b.index}", SublayerSimilarity()) for b in blocks])
    attention, mlp = values.T
    half = len(blocks) // 2
    early, late = float(attention[: min(2, half)].mean()), float(attention[half:].mean())
    holds = float(attention.mean()) > float(mlp.mean()) and late > early
    told = (
        f"Mean similarity of attention {attention.mean():.4f}, of MLPs {mlp.mean():.4f}; of attention in the first "
        f"blocks {early:.4f}, in the second half {late:.4f}"
    )
    numbers = [
        {"block": block.index, "attention": float(a), "mlp": float(m)}
        for block, a, m in zip(blocks, attention, mlp, strict=True)
    ]
    return Result(Verdict.of(holds), told, numbers)
