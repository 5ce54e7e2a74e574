"""Handwritten digits of 8 x 8 pixels, as scikit-learn brings them."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from ..errors import TransectError
from ..parameters import Range
from .registry import Drawn, task


@task("digits", paper="UCI:optdigits")
def digits(count: int, generator: torch.Generator, *, held_out: Annotated[int, Range(1, 1796)] = 360) -> Drawn:
    """Which of ten digits an image of 8 x 8 grey values from -1 to 1 shows; for bidirectional models of images.

    The 1,797 images are drawn with replacement from two parts that are always the same: for even seeds from those to
    train on, for odd ones from those held out.

    held_out: how many images are held out.
    """
    pixels, classes, order = shuffled()
    part = order[:held_out] if generator.initial_seed() % 2 else order[held_out:]
    if not len(part):
        raise TransectError("digits: no image is left to train on")
    drawn = part[torch.randint(len(part), (count,), generator=generator)]
    return Drawn(pixels[drawn], classes[drawn], 10)


def shuffled() -> tuple[Tensor, Tensor, Tensor]:
    """All images (1797 x 1 x 8 x 8, from -1 to 1), what they show, and an order of them that is always the same."""
    from sklearn.datasets import load_digits  # takes a second to import

    images, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(images).float().view(-1, 1, 8, 8) / 8 - 1, torch.from_numpy(classes), order
