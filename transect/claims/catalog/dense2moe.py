"""Claims of Dense2MoE (Zheng et al., ICCV 2025, arXiv:2510.09094)."""

from __future__ import annotations

from dataclasses import replace

import torch

from ...anatomy import Anatomy
from ...conversion import conversion_named
from ...conversion.routed import parts_around
from ...parts.catalog.dense2moe_blocks import Dense2MoEBlocks
from ..context import Context
from ..controls import mean_of
from ..converted import converted
from ..cut_mlps import before_and_after, cut, distilled, of_mlps, pruned
from ..ordering import beside_dense, comparison, judge
from ..registry import NotApplicable, Result, Verdict, claim
from ..routed import beginning, loss_of, require_trainable

PAPER = "arXiv:2510.09094"
EXPERTS, STEPS, DRAWS = 12, 40, 3
ACTIVE = (8, 4, 2, 0)  # of 12 experts of 1/16 of the neurons, beside a quarter that is shared: 75, 50, 37.5, 25 %
CHOSEN = conversion_named("dense2moe")


def _share(active: int) -> float:
    return 0.25 + 0.75 * active / EXPERTS


@claim(
    "dense2moe/against-pruning",
    method="dense2moe",
    paper=PAPER,
    statement="At as many neurons for a token, and after as many steps of distillation, shared and routed experts "
    "lose less than MLPs pruned to so many neurons.",
)
def against_pruning(context: Context) -> Result:
    """The paper's pair is 37.5 %; at 25 % only the shared expert runs. Both by the same Taylor scores and loss; what is
    pruned trains the numbers of its MLPs in one stage. Untrained losses stand beside."""
    context.require_language_model()
    found = []
    for active in ACTIVE:
        ours, theirs = cut(context, "dense2moe", active=active), pruned(context, _share(active))
        stages = CHOSEN.training({"active": active})
        found += before_and_after(
            context, _share(active), ("shared and routed", ours, stages),
            ("pruned", theirs, distilled(stages[0], of_mlps(theirs))), STEPS,
        )  # fmt: skip
    trained = judge([one for one in found if one.better.endswith("trained")])
    return beside_dense(context, replace(trained, numbers=judge(found).numbers))


@claim(
    "dense2moe/half-as-wide",
    method="dense2moe",
    paper=PAPER,
    statement="After as many steps, 37.5 % of the neurons in a shared expert and two routed ones lose less than MLPs "
    "pruned to 50 %.",
)
def half_as_wide(context: Context) -> Result:
    """The paper's widths 1.5 and 2 of 4."""
    context.require_language_model()
    ours, theirs = cut(context, "dense2moe"), pruned(context, 0.5)
    stages = CHOSEN.training({"active": 2})
    other = distilled(stages[0], of_mlps(theirs))
    named = ("37.5 % in experts", ours, stages), ("50 % pruned", theirs, other)
    return beside_dense(context, judge(before_and_after(context, 0.375, *named, STEPS, untrained=False)))


@claim(
    "dense2moe/taylor",
    method="dense2moe",
    paper=PAPER,
    statement="A shared expert of the neurons with the largest Taylor scores loses less than one of random neurons, "
    "alone and with two routed experts, untrained.",
)
def taylor(context: Context) -> Result:
    """The random ones are the mean of three draws."""
    context.require_language_model()
    found = []
    for active in (0, 2):
        ours = context.evaluate(cut(context, "dense2moe", active=active).model, _share(active))
        draws = [
            context.evaluate(
                cut(context, "dense2moe", seed=draw, active=active, importance="random").model, _share(active)
            )
            for draw in range(DRAWS)
        ]
        found.append(comparison(_share(active), ("taylor", ours), ("random", mean_of(draws))))
    return beside_dense(context, judge(found))


@claim(
    "dense2moe/two-stages",
    method="dense2moe",
    paper=PAPER,
    statement="Training the shared expert first and the others behind it loses less than training all of them together "
    "for as many steps.",
)
def two_stages(context: Context) -> Result:
    """At the default 37.5 %, with the same losses and balance."""
    context.require_language_model()
    stages = CHOSEN.training({"active": 2})
    together = distilled(stages[1], r"\.(shared|split|router)\.")
    ours, theirs = cut(context, "dense2moe"), cut(context, "dense2moe")
    named = ("one after the other", ours, stages), ("together", theirs, together)
    return beside_dense(context, judge(before_and_after(context, 0.375, *named, STEPS, untrained=False)))


@claim(
    "dense2moe-blocks/against-dropping",
    method="dense2moe-blocks",
    paper=PAPER,
    statement="After as many steps of distillation, groups of two blocks of which each text chooses one lose less than "
    "groups of which every text runs the same one.",
)
def blocks_against_dropping(context: Context) -> Result:
    """The same one is the one that changes the stream more. Losses are of what is behind the beginning, which runs all
    blocks; the routers choose by it, and what they choose for held-out texts is told."""
    prompt = beginning(context)
    require_trainable(context)
    if len(context.anatomy.blocks) < 2:
        raise NotApplicable("the model has a single block")
    settings = {"prompt": prompt}
    routed = converted(context, "dense2moe-blocks", settings, STEPS).anatomy
    fixed = converted(context, "dense2moe-blocks", settings, STEPS, change=fix_choices).anatomy
    ours, theirs = (loss_of(context, anatomy.model, prompt) for anatomy in (routed, fixed))
    judged = judge([comparison(0.5, ("chosen by each text", ours), ("the same for all", theirs))])
    other = _otherwise(context, routed)
    verdict = judged.verdict if other else Verdict.DOES_NOT_HOLD  # what all texts choose is no choice
    told = f"{judged.explanation}. Choices that are not the usual one of their group: {other:.2f}"
    return Result(verdict, f"{told}; loss without skipping "
                  f"{loss_of(context, context.fresh().model, prompt).loss:.4f}.", judged.numbers)  # fmt: skip


@claim(
    "dense2moe-blocks/smaller-groups",
    method="dense2moe-blocks",
    paper=PAPER,
    statement="After as many steps of distillation, groups of two blocks of which one runs lose less than groups of "
    "four of which two run.",
)
def smaller_groups(context: Context) -> Result:
    """Both skip half of the blocks behind the beginning. In groups of two neighbours, in groups of four two that are
    adjacent; each is distilled by the stream behind its groups."""
    prompt = beginning(context)
    require_trainable(context)
    if len(context.anatomy.blocks) < 4:
        raise NotApplicable("the model has fewer than four blocks")
    layers = f"0-{len(context.anatomy.blocks) // 4 * 4 - 1}"
    two, four = (
        converted(
            context, "dense2moe-blocks", {"prompt": prompt, "blocks": blocks, "active": blocks // 2, "layers": layers},
            STEPS,
        )
        for blocks in (2, 4)
    )  # fmt: skip
    named = [(name, loss_of(context, one.anatomy.model, prompt)) for name, one in (("two", two), ("four", four))]
    judged = judge([comparison(0.5, *named)])
    whole = loss_of(context, context.fresh().model, prompt).loss
    return replace(judged, explanation=f"{judged.explanation}; loss without skipping {whole:.4f}.")


@torch.no_grad()
def fix_choices(anatomy: Anatomy) -> None:
    """Let all texts choose, and go on to choose, what the routers prefer now."""
    for part in parts_around(anatomy, Dense2MoEBlocks).values():
        if part.place == 0:
            part.bank.weight.zero_()
            part.bank.bias.copy_(1e4 * (torch.arange(part.places) == part.bank.bias.argmax()))


@torch.no_grad()
def _otherwise(context: Context, anatomy: Anatomy) -> float:
    """Share of held-out texts, mean over groups, that choose another block of two than most texts do."""
    banks = [part.bank for part in parts_around(anatomy, Dense2MoEBlocks).values() if part.place == 0]
    chosen: list[list[torch.Tensor]] = []
    for batch in context.evaluation:
        anatomy.model(**{name: tensor.to(anatomy.model.device) for name, tensor in batch.items()})
        chosen.append([bank.chosen.float() for bank in banks])
    seconds = [float(torch.cat(found).mean()) for found in zip(*chosen, strict=True)]
    return sum(min(second, 1 - second) for second in seconds) / len(seconds)
