"""Claims of IA-RED² (Pan et al., NeurIPS 2021, arXiv:2106.12620)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
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
from ..registry import Result, Verdict, claim

_PAPER = "arXiv:2106.12620"
SIDE, GRID = 16, 4  # of an image; a digit of 8 x 8 lies in it, at a multiple of GRID
SIZES: dict[str, Any] = {
    "hidden": 32, "blocks": 3, "heads": 2, "neurons": 64, "image": SIDE, "patch": 2, "channels": 1, "classes": 10,
}  # fmt: skip
STEPS, BATCH, RATE = 1500, 64, 3e-3  # of the model before
TURNS, FASTER, TESTED = 240, 1e-2, 360  # steps of the three groups together, at a higher rate for so few; images
PENALTIES = (0.0, 0.5, 2.0)
NOISE = 0.3
_GAIN, _POINTS = 1.4, 0.7  # the paper's speed-up, and the accuracy that it costs at most


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


@lru_cache(maxsize=8)
def _converted(steps: int, turns: int, penalty: float) -> Any:
    """The model, converted and trained. The cache keeps it, so that it is read and never changed."""
    model = copy.deepcopy(_base(steps))
    shown = images(max(1, turns // 3) * BATCH + 4 * BATCH, 2)
    data = Batches([
        {"pixel_values": pixels, "labels": classes}
        for pixels, classes in zip(shown.pixels.split(BATCH), shown.classes.split(BATCH), strict=True)
    ])  # fmt: skip
    plan = Plan("ia-red2", {"penalty": penalty}, steps=turns, lr=FASTER, epochs=3, batch_size=BATCH, held_out=0.1)
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
    """Scaled down: three blocks, digits on noise in 64 patches; cost is operations (no time is measured)."""
    asked = images(TESTED, 1)
    before, after = _judge(_base(STEPS), asked), _judge(_converted(STEPS, TURNS, 0.5), asked)
    ratio, lost = before.flops / after.flops, before.accuracy - after.accuracy
    return Result(
        Verdict.of(ratio >= _GAIN and lost < _POINTS),
        f"{ratio:.2f} times as cheap, {after.kept:.0%} of the patches kept, for {lost:.1f} points of "
        f"{before.accuracy:.1f} % accuracy on {TESTED} images; one seed.",
        [{"model": name, **one._asdict()} for name, one in (("as it was", before), ("converted", after))],
    )


@claim(
    "ia-red2/penalty",
    method="ia-red2",
    paper=_PAPER,
    statement="The larger the penalty of a wrong answer, the more patches are kept.",
)
def penalty(context: Context) -> Result:
    """Scaled down as the others are; one seed."""
    asked = images(TESTED, 1)
    found = [_judge(_converted(STEPS, TURNS, tau), asked) for tau in PENALTIES]
    rises = all(one.kept <= other.kept for one, other in pairwise(found))
    told = ", ".join(f"{one.kept:.0%} at {tau:g}" for tau, one in zip(PENALTIES, found, strict=True))
    return Result(
        Verdict.of(rises and found[0].kept < found[-1].kept),
        f"Patches kept, mean over groups: {told}.",
        [{"penalty": tau, **one._asdict()} for tau, one in zip(PENALTIES, found, strict=True)],
    )


@claim(
    "ia-red2/where",
    method="ia-red2",
    paper=_PAPER,
    statement="Learned dropping is more accurate than keeping as many patches by the class position's attention, which "
    "is no less accurate than keeping random ones; and scores are higher within the object.",
)
def where(context: Context) -> Result:
    """Each image keeps as many patches before each group as the learned policy keeps; the same blocks for all three."""
    asked, model = images(TESTED, 1), copy.deepcopy(_converted(STEPS, TURNS, 0.5))
    decisions = decided(model, {"pixel_values": asked.pixels})[1]
    counts = [one.kept.sum(1) for one in decisions]
    rows = [{"kept by": "interpreter", **_judge(model, asked)._asdict()}]
    for way in ("attention", "random"):
        with _choosing(model, way, counts), torch.no_grad():
            logits, found = decided(model, {"pixel_values": asked.pixels})
        right = (logits.argmax(-1) == asked.classes).double().mean()
        rows.append({"kept by": way, "accuracy": 100 * float(right), "kept": _kept(found)})
    scores = decisions[0].scores.double()
    mass = float(((scores * asked.inside).sum(1) / scores.sum(1)).mean())
    area = float(asked.inside.double().mean())
    best = scores.argmax(1, keepdim=True)
    hits = float(asked.inside.gather(1, best).double().mean())
    learned, attention, chance = (row["accuracy"] for row in rows)
    holds = learned > attention >= chance and mass > area
    return Result(
        Verdict.of(holds),
        f"Accuracy {learned:.1f} % by the interpreters, {attention:.1f} % by attention, {chance:.1f} % at random; "
        f"{mass:.0%} of the first group's scores lie on the digit, which is {area:.0%} of the patches, and the best "
        f"patch is on it in {hits:.0%} of {TESTED} images.",
        rows,
    )


@contextmanager
def _choosing(model: Any, way: Literal["attention", "random"], counts: list[Tensor]) -> Iterator[None]:
    """Inside the `with`, each group keeps the patches that are best in another way, as many an image as given (n)."""
    generator = torch.Generator().manual_seed(0)
    led = [block for block in Anatomy(model).block_list if block.around.part.group is not None]
    before = [block.around.part._dropped for block in led]
    for block, number, plain in zip(led, counts, before, strict=True):
        part = block.around.part

        def dropped(x: Tensor, block: Any = block, part: Any = part, number: Tensor = number, plain: Any = plain):
            values = _attention(block, x) if way == "attention" else torch.rand(x.shape[:2], generator=generator)

            def chosen(scores: Tensor, present: Tensor) -> tuple[Tensor, None]:
                rank = values[:, part.prefix :].masked_fill(~present, -1).argsort(1, descending=True).argsort(1)
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
