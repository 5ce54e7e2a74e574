"""Paths through a model's layers, and the edits that lead from one to another (Li et al. 2025, arXiv:2507.07996).

A path is a tuple of layer numbers, 0 to N - 1, with repetitions. An edit takes `length` of its entries from `place` on:
they are left out (`copies` = 0), or follow once more, `copies` times.
"""

from __future__ import annotations

from random import Random
from typing import Literal, NamedTuple

Path = tuple[int, ...]
Space = Literal["both", "skip", "repeat"]
SIZES = (1, 2, 3, 4)  # of what is edited at once, and how often it is repeated


class Edit(NamedTuple):
    """One step of the search; see the module."""

    place: int
    length: int
    copies: int

    def of(self, path: Path) -> Path:
        """The path after the edit."""
        end = self.place + self.length
        taken = path[self.place : end]
        return path[: self.place] + (taken * (self.copies + 1) if self.copies else ()) + path[end:]


def edits_of(path: Path, space: Space, longest: int) -> list[Edit]:
    """Every edit of a path after which it has 1 to `longest` entries."""
    found = []
    for length in SIZES:
        for place in range(len(path) - length + 1):
            if space != "repeat" and len(path) > length:
                found.append(Edit(place, length, 0))
            if space != "skip":
                found += [Edit(place, length, copies) for copies in SIZES if len(path) + length * copies <= longest]
    return found


def random_path(layers: int, edits: int, space: Space, longest: int, random: Random) -> Path:
    """The plain path after as many edits at random, each with equal chances among those that are possible."""
    path = tuple(range(layers))
    for _ in range(edits):
        possible = edits_of(path, space, longest)
        if not possible:
            break
        path = random.choice(possible).of(path)
    return path


def runs(path: Path, layers: int) -> list[int]:
    """How often each of the layers is on the path."""
    return [path.count(layer) for layer in range(layers)]


def segments(counts: list[int], repeated: bool) -> list[int]:
    """Lengths of the stretches of neighbouring layers that are all skipped, or all repeated."""
    found, length = [], 0
    for count in [*counts, 1]:
        edited = count > 1 if repeated else count == 0
        if length and not edited:
            found.append(length)
        length = length + 1 if edited else 0
    return found


def written(path: Path, layers: int) -> str:
    """A path as a reader sees it: ascending stretches, such as "0-3 2-3 5"."""
    if path == tuple(range(layers)):
        return "all, once"
    stretches = [[path[0], path[0]]]
    for layer in path[1:]:
        if layer == stretches[-1][1] + 1:
            stretches[-1][1] = layer
        else:
            stretches.append([layer, layer])
    return " ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in stretches)
