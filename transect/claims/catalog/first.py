"""Claims of FiRST (Jain et al., Findings of EMNLP 2025, arXiv:2410.12513)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection
from dataclasses import replace
from statistics import mean
from typing import Any

import torch

from ...anatomy import Anatomy
from ...conversion import conversion_named
from ...conversion.catalog.first import decisions, set_thresholds
from ...conversion.routed import loss_behind, parts_around
from ...data import load
from ...parts.catalog.first import First
from ..context import Context, Measured
from ..controls import mean_of
from ..converted import BATCH
from ..converted import converted as trained
from ..ordering import comparison, judge
from ..pairs import paired
from ..registry import NotApplicable, Result, Verdict, claim
from ..routed import beginning, converted, loss_of, require_trainable
from ..scratch import batches_of, cut

STEPS = 200
DRAWS = 5
SHARE = 0.25  # of the blocks
# At the bundled model's start a batch's own loss moves a router as much as a penalty of 0.007 does. With much larger
# ones AdamW's steps, which are of one size, are those of the penalty alone, and no longer depend on its weight.
PENALTIES = (0.0, 0.003, 0.01, 0.03)
SEEDS = (0, 1, 2)
LENGTH, TRAINED, JUDGED = 64, 512, 64  # of the penalties' many models: tokens of a piece, pieces of text


def _routers(context: Context) -> int:
    """How many blocks get one; not applicable to fewer than two."""
    require_trainable(context)
    count = len(context.anatomy.blocks) - 2
    if count < 2:
        raise NotApplicable("the first and the last block are never skipped, and fewer than two are between them")
    return count


@claim(
    "first/below-fixed-masks",
    method="first",
    paper="arXiv:2410.12513",
    statement="At an equal number of skipped blocks, routers that read a text's beginning lose less than a fixed "
    "random choice of blocks and than blocks at even distances; the best fixed choice is the third control.",
)
def below_fixed_masks(context: Context) -> Result:
    """A quarter of the blocks, with no other number trained than the routers'; losses are of what is behind the
    beginning. The threshold is the one at which the judged texts, of which it reads the beginnings alone, skip as many
    blocks as the masks; where that is not met to the block, the masks' losses are interpolated to the routers' number.
    The best fixed choice is of the blocks without which, one at a time, the calibration text loses least.
    """
    routers, prompt = _routers(context), beginning(context)
    blocks = len(context.anatomy.blocks)
    count = min(max(1, round(SHARE * blocks)), routers)
    settings = {"prompt": prompt, "penalty": 0.01}
    model = _trained(context, settings)
    set_thresholds(Anatomy(model), context.evaluation, count / blocks, False)
    skipped = round(_skipped(model, context), 6)
    found = loss_of(context, model, prompt)
    fixed = converted(context, "first", {"prompt": prompt, "start": 100.0})
    numbers = list(range(1, blocks - 1))

    def without(chosen: Collection[int]) -> Any:
        fix_routers(fixed, chosen)
        return loss_of(context, fixed, prompt)

    def even(many: int) -> list[int]:
        return [numbers[(2 * i + 1) * routers // (2 * many)] for i in range(many)]

    alone = {number: _calibration_loss(context, fixed, number, prompt) for number in numbers}
    order = sorted(alone, key=lambda number: alone[number])
    masks: dict[str, Callable[[int], Measured]] = {
        "a random choice": lambda many: mean_of([without(chosen) for chosen in _choices(numbers, many)]),
        "even distances": lambda many: without(even(many)),
        "the best fixed choice": lambda many: without(order[:many]),
    }
    pairs = [(name, _at(mask, skipped)) for name, mask in masks.items()]
    judged = judge([comparison(1.0, ("routers", found), pair) for pair in pairs])
    same = ", which is the best fixed choice" if set(even(count)) == set(order[:count]) else ""
    told = (
        f"{judged.explanation}. Routers and masks skip {skipped:.2f} of {blocks} blocks on the held-out text (even "
        f"distances: {', '.join(map(str, even(count)))}{same}); loss {found.loss:.4f}, without skipping "
        f"{loss_of(context, context.fresh().model, prompt).loss:.4f}."
    )
    required = judge([comparison(1.0, ("routers", found), pair) for pair in pairs[:2]])
    return Result(required.verdict, told, judged.numbers)


def _choices(numbers: list[int], many: int) -> list[tuple[int, ...]]:
    """So many blocks of these: every choice where there are few, else some at random."""
    if math.comb(len(numbers), many) <= DRAWS:
        return list(itertools.combinations(numbers, many))
    seeds = [torch.Generator().manual_seed(draw) for draw in range(DRAWS)]
    return [tuple(numbers[i] for i in torch.randperm(len(numbers), generator=seed)[:many]) for seed in seeds]


def _at(mask: Callable[[int], Measured], skipped: float) -> Measured:
    """The loss of a kind of mask at a number of blocks that may lie between two whole ones."""
    many, beyond = int(skipped), skipped % 1
    fewer = mask(many)
    return replace(fewer, nats=torch.lerp(fewer.nats, mask(many + 1).nats, beyond)) if beyond else fewer


def _trained(context: Context, settings: dict[str, Any], seed: int = 0) -> Any:
    """Routers trained, and no other number: the first of the method's stages alone."""
    routers, _ = (first := conversion_named("first")).training(first.settings(settings))
    stages = [replace(routers, share=1.0)]
    model = trained(context, "first", settings, STEPS, seed=seed, stages=stages).anatomy.model
    plain = converted(context, "first", settings)
    found = {name: tensor for name, tensor in model.state_dict().items() if ".around." in name}
    plain.load_state_dict(found, strict=False)
    return plain


@torch.no_grad()
def fix_routers(model: Any, skipped: Collection[int]) -> None:
    """Let the routers skip these blocks behind every beginning, and run the others."""
    for number, part in parts_around(Anatomy(model), First).items():
        part.bias.fill_(-100.0 if number in skipped else 100.0)


def _skipped(model: Any, context: Context) -> float:
    """Blocks that a held-out sequence skips on average."""
    parts = parts_around(Anatomy(model), First).values()
    found = zip(decisions(Anatomy(model), context.evaluation), parts, strict=True)
    return sum(float((rho <= part.threshold).float().mean()) for rho, part in found)


@torch.no_grad()
def _calibration_loss(context: Context, model: Any, number: int, prompt: int) -> float:
    """The loss on the calibration text without one block."""
    fix_routers(model, [number])
    summed = [loss_behind(prompt)(model, None, batch) for batch in context.calibration]
    return float(sum(one for one, _ in summed)) / sum(count for _, count in summed)


@claim(
    "first/penalty",
    method="first",
    paper="arXiv:2410.12513",
    statement="The larger the penalty on not skipping, the fewer blocks are expected to run.",
)
def penalty(context: Context) -> Result:
    """Four penalties, the mean of three orders of the batches: the sum of the routers' probabilities on new text. Texts
    are cut into short pieces, since it is twelve trainings."""
    routers, context = _routers(context), _of_pieces(context)
    prompt, rows = beginning(context), []
    for weight in PENALTIES:
        found = []
        for seed in SEEDS:
            model = _trained(context, {"prompt": prompt, "penalty": weight}, seed)
            found.append(sum(float(rho.mean()) for rho in decisions(Anatomy(model), context.evaluation)))
        rows.append({"penalty": weight, "expected to run": sum(found) / len(found), "least": min(found),
                     "most": max(found)})  # fmt: skip
    values = [row["expected to run"] for row in rows]
    holds = all(later < earlier for earlier, later in itertools.pairwise(values))
    told = (
        f"Of {routers} routed blocks, expected to run: {', '.join(f'{value:.3f}' for value in values)}, at penalties "
        f"of {', '.join(f'{weight:g}' for weight in PENALTIES)}."
    )
    return Result(Verdict.of(holds), told, rows)


@claim(
    "first/tasks",
    method="first",
    paper="arXiv:2410.12513",
    statement="Routers that are trained on two clearly different kinds of text skip different blocks, and texts of "
    "either kind lose more by the other's routers.",
)
def tasks(context: Context) -> Result:
    """The model's text and Python's language reference, in pieces; three orders of the batches, a quarter of the blocks
    skipped by either's routers, whichever text they read. Two texts of different kinds, each by its own routers, are to
    skip different blocks more often than two of one kind, and both kinds to lose more, by two standard errors each.
    """
    routers, here = _routers(context), _of_pieces(context)
    kinds = {"own": here, "reference": _reference(context)}
    prompt, blocks = min(map(beginning, kinds.values())), len(context.anatomy.blocks)
    share, rows = min(max(1, round(SHARE * blocks)), routers) / blocks, []
    for seed in SEEDS:
        models = {kind: _trained(one, {"prompt": prompt, "penalty": 0.01}, seed) for kind, one in kinds.items()}
        row, masks = {"seed": float(seed)}, {}
        for kind, one in kinds.items():
            for of, model in models.items():
                set_thresholds(Anatomy(model), one.evaluation, share, False)
                row[f"{kind} text by {of} routers"] = loss_of(one, model, prompt).loss
                if of == kind:
                    masks[kind] = _masks(model, one)
        row["differ"] = _differ(*masks.values())
        row["differ within a kind"] = mean(_differ(mask, mask) for mask in masks.values())
        rows.append(row)
    told, held = [], []
    for more, less, what in (
        ("differ", "differ within a kind", "pairs of texts that skip different blocks, of two kinds less of one"),
        ("own text by reference routers", "own text by own routers", "loss of the own text by the other routers"),
        ("reference text by own routers", "reference text by reference routers", "of the reference by the other ones"),
    ):
        difference, error = paired(*([row[name] for row in rows] for name in (more, less)))
        held.append(difference > 2 * error)
        told.append(f"{what} {difference:+.4f} ± {error:.4f}")
    return Result(Verdict.of(all(held)), f"Over {len(SEEDS)} seeds: {'; '.join(told)}.", rows)


def _masks(model: Any, context: Context) -> torch.Tensor:
    """Which routed blocks each held-out text skips (texts x routers)."""
    parts = parts_around(Anatomy(model), First).values()
    found = zip(decisions(Anatomy(model), context.evaluation), parts, strict=True)
    return torch.stack([rho <= part.threshold for rho, part in found], dim=1)


def _differ(ones: torch.Tensor, others: torch.Tensor) -> float:
    """The share of pairs that are not the same; of a kind with itself no text is paired with itself."""
    apart = (ones[:, None] != others[None]).any(-1).double()
    return float(apart.sum() / (apart.numel() - (len(ones) if ones is others else 0)))


def _reference(context: Context) -> Context:
    """As many pieces of Python's language reference."""
    specimen = context.specimen
    if specimen.tokenizer is None:
        raise NotApplicable("the model has no tokenizer, by which another text could be read")
    calibration, evaluation = (
        load(
            f"pydoc:{part}", specimen.model, specimen.tokenizer, sequence_length=LENGTH, sequences=most, full_only=True
        )
        for part, most in (("calibration", TRAINED), ("heldout", JUDGED))
    )
    return _of_pieces(Context(context.model, calibration, evaluation, progress=context.progress, specimen=specimen))


def _of_pieces(context: Context) -> Context:
    """The same with pieces of its texts, all of one length."""
    found = []
    for batches, most in ((context.calibration, TRAINED), (context.evaluation, JUDGED)):
        rows = list(batches.texts())
        found.append(batches_of(cut(rows, min(LENGTH, min(map(len, rows))), most), BATCH))
    return Context(context.model, *found, progress=context.progress, specimen=context.specimen)
