"""Claims of robust weight signatures (Cai et al., ICML 2023, arXiv:2302.12480)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ...merging.signature import cosine, rounded, signature_of
from ..context import Context
from ..digit_networks import Images, digit_accuracy, digit_images, network, train_digits
from ..registry import Result, Verdict, claim

PAPER = "arXiv:2302.12480"
SIZES = (64, 128, 128, 128, 10)
START, STEPS = 60, 400  # of the common start, and of each training from it
LEVELS = 16  # 4 bits a number


def noise(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian, of standard deviation 0.6; grey values go from -1 to 1."""
    return pixels + 0.6 * torch.randn(pixels.shape, generator=generator)


def occlusion(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """A white square of 4 x 4 pixels over each image of 8 x 8."""
    rows = torch.randint(5, (len(pixels), 2), generator=generator)
    place = torch.arange(8)
    inside = [(place >= rows[:, one : one + 1]) & (place < rows[:, one : one + 1] + 4) for one in (0, 1)]
    return torch.where((inside[0][:, :, None] & inside[1][:, None, :]).flatten(1), torch.ones(()), pixels)


CORRUPTIONS: Mapping[str, Callable[[Tensor, torch.Generator], Tensor]] = {"noise": noise, "occlusion": occlusion}
Numbers = dict[str, Tensor]


@dataclass
class Study:
    """Networks from one start: a clean one on each half of the images, and for each corruption a robust one on each."""

    start: nn.Sequential
    clean: list[nn.Sequential]
    robust: dict[str, list[nn.Sequential]]

    def signature(self, corruption: str, half: int) -> Numbers:
        """Of all tensors."""
        base, clean, robust = map(_numbers, (self.start, self.clean[half], self.robust[corruption][half]))
        return signature_of(base, clean, robust, base)


def _numbers(model: nn.Module) -> Numbers:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def _patched(model: nn.Sequential, values: Mapping[str, Tensor], strength: float) -> nn.Sequential:
    made = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in values.items():
            made.get_parameter(name).add_(strength * tensor)
    return made


@lru_cache
def _study(steps: int) -> Study:
    pixels, classes = digit_images()[0]
    halves: list[Images] = [(pixels[part::2], classes[part::2]) for part in (0, 1)]
    start = train_digits(network(SIZES, 0), START, 0)
    clean = [train_digits(copy.deepcopy(start), steps, 1 + half, None, images) for half, images in enumerate(halves)]
    robust = {
        name: [train_digits(copy.deepcopy(start), steps, 1 + half, one, images) for half, images in enumerate(halves)]
        for name, one in CORRUPTIONS.items()
    }
    return Study(start, clean, robust)


@lru_cache
def _corrupted(name: str) -> Images:
    """The held-out images, ten times over, each with other random numbers."""
    pixels, classes = digit_images()[1]
    generator = torch.Generator().manual_seed(0)
    shown = torch.cat([CORRUPTIONS[name](pixels, generator) for _ in range(10)])
    return shown, classes.repeat(10)


def _row(what: str, model: nn.Module) -> dict[str, Any]:
    corrupted = {name: digit_accuracy(model, _corrupted(name)) for name in CORRUPTIONS}
    return {"model": what, "clean": digit_accuracy(model, digit_images()[1]), **corrupted}


@claim(
    "rws/robustness-transfers",
    method="rws",
    paper=PAPER,
    statement="A signature from one half of the data gives a clean model of the other half robustness, in few bits.",
)
def robustness_transfers(context: Context) -> Result:
    """Corrupted digits: at least half of what robust training gains, at less than 2 points of clean accuracy."""
    study = _study(STEPS)
    rows, verdicts, words = [_row("clean", study.clean[1])], [], []
    for name in CORRUPTIONS:
        values = study.signature(name, 0)
        robust = _row(f"robust to {name}", study.robust[name][1])
        for strength in (0.5, 1.0, 1.5):
            rows.append(_row(f"clean + {strength:g} {name}", _patched(study.clean[1], values, strength)))
        few = _row(f"clean + {name}, {LEVELS} levels", _patched(study.clean[1], rounded(values, LEVELS), 1.0))
        rows += [few, robust]
        gain, whole = few[name] - rows[0][name], robust[name] - rows[0][name]
        verdicts.append(gain >= 0.5 * whole > 0 and few["clean"] >= rows[0]["clean"] - 0.02)
        words.append(
            f"{name}: {rows[0][name]:.3f} -> {few[name]:.3f}, robust training {robust[name]:.3f}, clean "
            f"{rows[0]['clean']:.3f} -> {few['clean']:.3f}"
        )
    return Result(Verdict.of(all(verdicts)), "; ".join(words), rows)


@claim(
    "rws/shallow-layers",
    method="rws",
    paper=PAPER,
    statement="The signature of the shallow layers alone holds most of the robustness.",
)
def shallow_layers(context: Context) -> Result:
    """The first half of the layers against all of them: at least half of the gain, for each corruption."""
    study = _study(STEPS)
    rows, verdicts, words = [_row("clean", study.clean[0])], [], []
    for name in CORRUPTIONS:
        values = study.signature(name, 0)
        layers = list(dict.fromkeys(key.partition(".")[0] for key in values))
        for count in range(1, len(layers) + 1):
            kept = {key: one for key, one in values.items() if key.partition(".")[0] in layers[:count]}
            rows.append(_row(f"clean + {name}, {count} of {len(layers)} layers", _patched(study.clean[0], kept, 1.0)))
        of_this = rows[-len(layers) :]
        gains = [row[name] - rows[0][name] for row in of_this]
        half = gains[len(layers) // 2 - 1]
        verdicts.append(half >= 0.5 * gains[-1] > 0)
        words.append(f"{name}: {half:+.3f} by the first half of the layers, {gains[-1]:+.3f} by all")
    return Result(Verdict.of(all(verdicts)), "; ".join(words), rows)


@claim(
    "rws/discriminative",
    method="rws",
    paper=PAPER,
    statement="Signatures of one corruption from two data sets are more alike than those of different corruptions.",
)
def discriminative(context: Context) -> Result:
    """Cosines between signatures from the two halves of the images, which no image is in twice."""
    study = _study(STEPS)
    names = list(CORRUPTIONS)
    found = {(name, half): study.signature(name, half) for name in names for half in (0, 1)}
    rows = [
        {"first half": one, "second half": other, "cosine": cosine(found[one, 0], found[other, 1])}
        for one in names for other in names
    ]  # fmt: skip
    same = [row["cosine"] for row in rows if row["first half"] == row["second half"]]
    different = [row["cosine"] for row in rows if row["first half"] != row["second half"]]
    return Result(
        Verdict.of(min(same) > max(different)),
        f"same corruption {', '.join(f'{one:.3f}' for one in same)}; different ones "
        f"{', '.join(f'{one:.3f}' for one in different)}",
        rows,
    )
