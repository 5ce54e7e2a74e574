"""Claims of p-MoD (Zhang et al., ICCV 2025, arXiv:2412.04449)."""

from __future__ import annotations

from typing import Any

from ...conversion.catalog.p_mod import shares
from ...parts.catalog.p_mod import kept_of
from ..context import Context, Measured
from ..ordering import comparison, judge
from ..registry import NotApplicable, Result, claim
from ..routed import beginning, converted, loss_of, require_trainable

STEPS, RATE = 20, 3e-4


def _measured(context: Context, targets: int, **settings: Any) -> Measured:
    """The loss behind the targets after the training."""
    model = converted(context, "p-mod", {"targets": targets, **settings}, STEPS, lr=RATE)
    return loss_of(context, model, targets)


def _kept(context: Context, targets: int) -> int:
    """How many targets the blocks of the falling schedule process, all together."""
    require_trainable(context)
    planned = shares(len(context.anatomy.blocks), "cosine", 0.5)
    if len(planned) < 2 or targets < 2:
        raise NotApplicable("the model has a single block, or sequences of a few tokens")
    return sum(kept_of(targets, share) for share in planned)


@claim(
    "p-mod/decay",
    method="p-mod",
    paper="arXiv:2412.04449",
    statement="After the same training, blocks that process fewer and fewer of the context's tokens lose less than "
    "blocks that all process the same share, at an equal mean share.",
)
def decay(context: Context) -> Result:
    """The shifted cosine against a constant share; the context is the beginning of each text. It has the most tokens at
    which the cosine's whole numbers are a number for each block; where none is found, the constant keeps one more."""
    most, blocks = beginning(context), len(context.anatomy.blocks)
    targets = next((n for n in range(most, most // 2, -1) if _kept(context, n) % blocks == 0), most)
    kept, each = _kept(context, targets), -(-_kept(context, targets) // blocks)
    falling, constant = (
        _measured(context, targets, decay=way, mean=at) for way, at in (("cosine", 0.5), ("constant", each / targets))
    )
    judged = judge([comparison(kept / blocks / targets, ("falling", falling), ("constant", constant))])
    dense = loss_of(context, context.fresh().model, targets)
    told = (
        f"{judged.explanation}. Of {targets} targets in {blocks} blocks, {kept} are processed with the falling share "
        f"and {each * blocks} with the constant one: loss {falling.loss:.4f} falling, {constant.loss:.4f} constant; of "
        f"the model as it was {dense.loss:.4f}, before this training."
    )
    return Result(judged.verdict, told, judged.numbers)


@claim(
    "p-mod/weights",
    method="p-mod",
    paper="arXiv:2412.04449",
    statement="After the same training, weights of tanh near 1 on processed and skipped tokens alike lose less than "
    "those of a sigmoid or a softmax on the processed ones.",
)
def weights(context: Context) -> Result:
    """TanhNorm and STRing against the one-sided gates that they replace, with the falling schedule."""
    targets = beginning(context)
    mean = _kept(context, targets) / len(context.anatomy.blocks) / targets
    ours = _measured(context, targets)
    others = {gate: _measured(context, targets, gate=gate, symmetric=False) for gate in ("sigmoid", "softmax")}
    judged = judge([comparison(mean, ("tanh", ours), (gate, one)) for gate, one in others.items()])
    losses = ", ".join(f"{gate} {one.loss:.4f}" for gate, one in {"tanh": ours, **others}.items())
    return Result(judged.verdict, f"{judged.explanation}. Losses: {losses}.", judged.numbers)
