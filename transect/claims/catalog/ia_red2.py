"""Claims of IA-RED² (Pan et al., NeurIPS 2021, arXiv:2106.12620)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ...anatomy import Anatomy
from ...conversion import Plan, convert_anatomy
from ...conversion.catalog.ia_red2 import decided
from ...data import Batches
from ...evaluation.operations import operations_counted
from ...parts import build_model
from ...parts.catalog.ia_red2 import Decision
from ...tasks import task_named
from ..context import Context
from ..descent import descend
from ..pairs import over_seeds
from ..registry import Result, Verdict, claim

_PAPER = "arXiv:2106.12620"
SIDE, GRID = 16, 4  # of an image; a digit of 8 x 8 lies in it, at a multiple of GRID
SIZES: dict[str, Any] = {
    "hidden": 32, "blocks": 3, "heads": 2, "neurons": 64, "image": SIDE, "patch": 2, "channels": 1, "classes": 10,
}  # fmt: skip
STEPS, BATCH, RATE = 1500, 64, 3e-3  # of the model before
TURNS, FASTER, TESTED = 240, 1e-2, 360  # steps of the three groups together, at a higher rate for so few; images
PENALTIES, SEEDS = (0.0, 0.5, 2.0), (0, 1, 2)
SWEPT = (2.0, 8.0, 32.0, 128.0)  # penalties, for the cost nearest to the paper's
TUNING = 1e-3  # rate at which blocks get used to a way of choosing patches, in TURNS steps
NOISE = 0.3
_GAIN, _POINTS = 1.4, 0.7  # the paper's speed-up, and the accuracy that it costs at most
Way = Literal["interpreter", "attention", "random"]
WAYS: tuple[Way, ...] = ("interpreter", "attention", "random")


class Images(NamedTuple):
    """pixels (n x 1 x SIDE x SIDE), classes (n), and which patches touch the digit (n x P)."""

    pixels: Tensor
    classes: Tensor
    inside: Tensor


class Judged(NamedTuple):
    """Share of the right answers in per cent, share of patches kept (mean over groups), operations for one image.

    The last group alone says little: its one block serves the class position only, and one patch is enough for it.
    """

    accuracy: float
    kept: float
    flops: float


def images(count: int, seed: int) -> Images:
    """Digits at random places on noise; odd seeds draw from the digits that are held out."""
    drawn = task_named("digits").draw(count, seed)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 1, SIDE, SIDE, generator=generator) * NOISE - 1
    corners = GRID * torch.randint((SIDE - 8) // GRID + 1, (count, 2), generator=generator)
    patch = SIZES["patch"]
    touched = torch.zeros(count, SIDE, SIDE)
    for number, (row, column) in enumerate(corners.tolist()):
        pixels[number, :, row : row + 8, column : column + 8] += drawn.inputs[number] + 1
        touched[number, row : row + 8, column : column + 8] = 1
    inside = torch.nn.functional.max_pool2d(touched[:, None], patch).flatten(1) > 0
    return Images(pixels, drawn.answers, inside)


@lru_cache(maxsize=1)
def _base(steps: int) -> Any:
    model = build_model("vit", **SIZES)
    shown = images(steps * BATCH, 0)

    def loss(step: int) -> Tensor:
        some = slice(step * BATCH, (step + 1) * BATCH)
        return model(pixel_values=shown.pixels[some], labels=shown.classes[some]).loss

    descend(model, loss, steps, RATE)
    return model


@lru_cache(maxsize=16)
def _converted(steps: int, turns: int, penalty: float, seed: int = 0) -> Any:
    """The model, converted and trained. The cache keeps it, so that it is read and never changed."""
    model = copy.deepcopy(_base(steps))
    shown = images(max(1, turns // 3) * BATCH + 4 * BATCH, 2)
    data = Batches([
        {"pixel_values": pixels, "labels": classes}
        for pixels, classes in zip(shown.pixels.split(BATCH), shown.classes.split(BATCH), strict=True)
    ])  # fmt: skip
    plan = Plan(
        "ia-red2", {"penalty": penalty}, steps=turns, lr=FASTER, epochs=3, batch_size=BATCH, held_out=0.1, seed=seed
    )  # fmt: skip
    return convert_anatomy(Anatomy(model), plan, data)[0].eval()


def _kept(decisions: list[Decision]) -> float:
    return sum(float(one.kept.double().mean()) for one in decisions) / len(decisions)


@torch.no_grad()
def _judge(model: Any, asked: Images) -> Judged:
    if any(hasattr(module, "bank_group") for module in model.modules()):
        logits, decisions = decided(model, {"pixel_values": asked.pixels})
        kept = _kept(decisions)
    else:
        logits, kept = model(pixel_values=asked.pixels).logits, 1.0
    with operations_counted() as counted:
        for pixels in asked.pixels[:20].split(1):
            model(pixel_values=pixels)
    right = (logits.argmax(-1) == asked.classes).double().mean()
    return Judged(100 * float(right), kept, counted.get_total_flops() / min(20, len(asked.pixels)))


@claim(
    "ia-red2/fewer-operations",
    method="ia-red2",
    paper=_PAPER,
    statement="Dropping redundant patches makes a trained vision transformer 1.4 times as cheap for less than 0.7 "
    "points of accuracy.",
)
def fewer_operations(context: Context) -> Result:
    """Scaled down: three blocks, digits on noise in 64 patches; cost is operations (no time is measured). Of several
    penalties, the one is judged that saves least but as much as is claimed, whatever its accuracy."""
    asked = images(TESTED, 1)
    before = _judge(_base(STEPS), asked)
    found = {tau: _judge(_converted(STEPS, TURNS, tau), asked) for tau in SWEPT}
    rows = [{"penalty": None, **before._asdict(), "times as cheap": 1.0}]
    rows += [
        {"penalty": tau, **one._asdict(), "times as cheap": before.flops / one.flops} for tau, one in found.items()
    ]
    cheap = {tau: one for tau, one in found.items() if before.flops / one.flops >= _GAIN}
    if not cheap:
        most = max(row["times as cheap"] for row in rows)
        return Result(Verdict.DOES_NOT_HOLD, f"At most {most:.2f} times as cheap, of penalties of {SWEPT}.", rows)
    tau, after = max(cheap.items(), key=lambda pair: pair[1].flops)
    lost = before.accuracy - after.accuracy
    return Result(
        Verdict.of(lost < _POINTS),
        f"{before.flops / after.flops:.2f} times as cheap at a penalty of {tau:g}, {after.kept:.0%} of the patches "
        f"kept, for {lost:.1f} points of {before.accuracy:.1f} % accuracy on {TESTED} images; one seed.",
        rows,
    )


@claim(
    "ia-red2/penalty",
    method="ia-red2",
    paper=_PAPER,
    statement="The larger the penalty of a wrong answer, the more patches are kept, and the higher is the accuracy.",
)
def penalty(context: Context) -> Result:
    """Scaled down as the others are; means over seeds of the conversion rise from each penalty to the next, and from
    the smallest to the largest by more than two standard errors of the seeds' own differences."""
    asked = images(TESTED, 1)
    found = {tau: [_judge(_converted(STEPS, TURNS, tau, seed), asked) for seed in SEEDS] for tau in PENALTIES}
    kept, accuracy = (
        torch.tensor([[getattr(one, name) for one in each] for each in found.values()], dtype=torch.float64)
        for name in ("kept", "accuracy")
    )  # each: penalties x seeds
    means = zip(PENALTIES, kept.mean(1).tolist(), accuracy.mean(1).tolist(), strict=True)
    more, better = kept[-1] - kept[0], accuracy[-1] - accuracy[0]
    errors = [over_seeds(one.tolist()).error for one in (more, better)]
    clear = all(float(one.mean()) > 2 * error for one, error in zip((more, better), errors, strict=True))
    return Result(
        Verdict.of(clear and all(bool((one.mean(1).diff() > 0).all()) for one in (kept, accuracy))),
        f"Patches kept (mean over groups) and right answers, means of {len(SEEDS)} seeds: "
        f"{', '.join(f'{share:.0%} and {right:.1f} % at {tau:g}' for tau, share, right in means)}; from the first to "
        f"the last {100 * float(more.mean()):+.0f} ± {100 * errors[0]:.0f} and {float(better.mean()):+.1f} ± "
        f"{errors[1]:.1f} points (standard errors over seeds).",
        [
            {"penalty": tau, "seed": seed, **one._asdict()}
            for tau, each in found.items() for seed, one in zip(SEEDS, each, strict=True)
        ],
    )  # fmt: skip


@claim(
    "ia-red2/where",
    method="ia-red2",
    paper=_PAPER,
    statement="Learned dropping is more accurate than keeping as many patches by the class position's attention, which "
    "is no less accurate than keeping random ones; and scores are higher within the object.",
)
def where(context: Context) -> Result:
    """Each image keeps as many patches before each group as the learned policy keeps; by each of the three ways the
    blocks are trained alike, since they come from a training with the learned one."""
    asked, learned_from = images(TESTED, 1), _converted(STEPS, TURNS, 0.5)
    decisions = decided(learned_from, {"pixel_values": asked.pixels})[1]
    counts = [one.kept.sum(1) for one in decisions]
    rows, rights = [], []
    for way in WAYS:
        model = _tuned(learned_from, way)
        with _choosing(model, way, counts, 0), torch.no_grad():
            logits, found = decided(model, {"pixel_values": asked.pixels})
        rights.append((logits.argmax(-1) == asked.classes).double())
        rows.append({"kept by": way, "accuracy": 100 * float(rights[-1].mean()), "kept": _kept(found)})
    ahead = 100 * (rights[0] - rights[1])
    error = float(ahead.std()) / len(ahead) ** 0.5
    scores = decisions[0].scores.double()
    mass = float(((scores * asked.inside).sum(1) / scores.sum(1)).mean())
    area = float(asked.inside.double().mean())
    best = scores.argmax(1, keepdim=True)
    hits = float(asked.inside.gather(1, best).double().mean())
    learned, attention, chance = (row["accuracy"] for row in rows)
    holds = float(ahead.mean()) > 2 * error and attention >= chance and mass > area
    return Result(
        Verdict.of(holds),
        f"Accuracy {learned:.1f} % by the interpreters, {attention:.1f} % by attention (standard error of the "
        f"difference {error:.1f} points), {chance:.1f} % at random; {mass:.0%} of the first group's scores lie on the "
        f"digit, which is {area:.0%} of the patches, and the best patch is on it in {hits:.0%} of {TESTED} images.",
        rows,
    )


def _tuned(learned_from: Any, way: Way) -> Any:
    """A copy whose blocks were trained on what this way keeps, as many patches as the learned policy does."""
    model, shown = copy.deepcopy(learned_from), images(TURNS * BATCH, 4)

    def loss(step: int) -> Tensor:
        some = slice(step * BATCH, (step + 1) * BATCH)
        with torch.no_grad():
            counts = [one.kept.sum(1) for one in decided(learned_from, {"pixel_values": shown.pixels[some]})[1]]
        with _choosing(model, way, counts, step + 1):
            logits = decided(model, {"pixel_values": shown.pixels[some]})[0]
        return torch.nn.functional.cross_entropy(logits, shown.classes[some])

    descend(model, loss, TURNS, TUNING)
    return model


@contextmanager
def _choosing(model: Any, way: Way, counts: list[Tensor], seed: int) -> Iterator[None]:
    """Inside the `with`, each group keeps the patches that are best in this way, as many an image as given (n)."""
    generator = torch.Generator().manual_seed(seed)
    led = [block for block in Anatomy(model).block_list if block.around.part.group is not None]
    before = [block.around.part._dropped for block in led]
    for block, number, plain in zip(led, counts, before, strict=True):
        part = block.around.part

        def dropped(x: Tensor, block: Any = block, part: Any = part, number: Tensor = number, plain: Any = plain):
            values = _attention(block, x) if way == "attention" else torch.rand(x.shape[:2], generator=generator)

            def chosen(scores: Tensor, present: Tensor) -> tuple[Tensor, None]:
                worth = scores if way == "interpreter" else values[:, part.prefix :]
                rank = worth.masked_fill(~present, -1).argsort(1, descending=True).argsort(1)
                return present & (rank < number[:, None]), None

            part._chosen = chosen
            try:
                return plain(x)
            finally:
                del part._chosen

        part._dropped = dropped
    try:
        yield
    finally:
        for block in led:
            del block.around.part._dropped


def _attention(block: Any, x: Tensor) -> Tensor:
    """What the class position sees of each position in the block to come (B x N), mean over heads."""
    attention, normed = block.attention, block.layernorm_before(x)
    size = attention.head_dim
    q = attention.q_proj(normed[:, :1]).unflatten(-1, (-1, size)).transpose(1, 2)
    k = attention.k_proj(normed).unflatten(-1, (-1, size)).transpose(1, 2)
    return (q @ k.transpose(-1, -2) * attention.scaling).softmax(-1).mean(1)[:, 0]
