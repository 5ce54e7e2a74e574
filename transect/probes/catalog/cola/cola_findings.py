"""What the numbers of the search for paths say, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CAVEATS = (
    "The search knows the answer and takes the best of many tries: oracle success is an upper bound, not an accuracy, "
    "and no speed-up that could be had without knowing the answer.",
    "A path that hits the answer by luck counts as one that computes it. Success no higher than that of random paths "
    "or of guessing says nothing about depth.",
    "Layers run out of order see states that they were never trained on.",
)


class Shares(NamedTuple):
    """Of one space: how many questions the model answers, and shares with their controls, NaN where there are none.

    corrected: of the wrong ones, those with some right path, or a shorter one than the model's; shorter: of the right
    ones, those with a shorter one. by_random, by_chance: likewise. lengths: of the shortest right paths of right and of
    wrong ones, means.
    """

    right: int
    wrong: int
    corrected: float
    corrected_by_random: float
    corrected_by_chance: float
    corrected_shorter: float
    corrected_shorter_by_random: float
    corrected_shorter_by_chance: float
    shorter: float
    shorter_by_random: float
    shorter_by_chance: float
    lengths: tuple[float, float]


def shares_of(found: Mapping[str, Tensor], number: int) -> Shares:
    """The shares of space `number` of the probe's quantities."""
    plain, searched, random = found["plain"] > 0, found["searched"][number], found["random"][number]
    layers, chance, fewer = found["skipped"].shape[1], found["chance"][number], found["chance_shorter"][number]

    def share(of: Tensor, among: Tensor) -> float:
        return float(of[among].double().mean()) if bool(among.any()) else torch.nan

    return Shares(
        int(plain.sum()), int((~plain).sum()),
        share(searched.isfinite(), ~plain), share(random.isfinite(), ~plain), share(chance, ~plain),
        share(searched < layers, ~plain), share(random < layers, ~plain), share(fewer, ~plain),
        share(searched < layers, plain), share(random < layers, plain), share(fewer, plain),
        (float(searched[plain].nanmean()), float(searched[~plain].nanmean())),
    )  # fmt: skip


def findings(found: Mapping[str, Tensor], spaces: Sequence[str], simulations: int) -> list[str]:
    """A few sentences for each space."""
    layers = found["skipped"].shape[1]
    told = []
    for number, space in enumerate(spaces):
        one = shares_of(found, number)
        edits = "skipping and repeating" if space == "both" else f"{space}ping" if space == "skip" else "repeating"
        if one.right:
            told.append(
                f"By {edits} layers, {one.shorter:.0%} of the {one.right} questions that the model answers rightly "
                f"have a right path of fewer than {layers} layers after {simulations} simulations "
                f"({_controls(one.shorter_by_random, one.shorter_by_chance)}); the shortest found has "
                f"{one.lengths[0]:.1f} layers, mean."
            )
        if one.wrong:
            told.append(
                f"By {edits} layers, {one.corrected:.0%} of the {one.wrong} questions that it answers wrongly have "
                f"some right path ({_controls(one.corrected_by_random, one.corrected_by_chance)}), and "
                f"{one.corrected_shorter:.0%} one of fewer than {layers} layers "
                f"({_controls(one.corrected_shorter_by_random, one.corrected_shorter_by_chance)}). This is oracle "
                "success."
            )
        told += _places(found, number, edits)
    return told


def _controls(by_random: float, by_chance: float) -> str:
    """What random paths and guesses reach, in words; no guesses where there is one answer only (NaN)."""
    guessing = "" if by_chance != by_chance else f"; guessing as many different answers: {by_chance:.0%}"
    return f"as many random paths: {by_random:.0%}{guessing}"


def _places(found: Mapping[str, Tensor], number: int, edits: str) -> list[str]:
    """Where the shortest right paths are edited more often than those that were tried."""
    beyond = found["skipped"][number] - found["skipped_tried"][number]
    if not bool(beyond.isfinite().all()) or beyond.max() <= 0:
        return []
    best, tried = int(beyond.argmax()), found["skipped_tried"][number]
    segment = float(found["skipped_segment"][number])
    length = "" if segment != segment else f" Stretches of skipped layers are {segment:.1f} layers long, mean."
    return [
        f"With {edits}, layer {best} stands out among those that shortest right paths leave out: "
        f"{float(found['skipped'][number, best]):.0%} of them do, and {float(tried[best]):.0%} "
        f"of all paths that were tried.{length}"
    ]
