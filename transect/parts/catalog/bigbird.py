"""BigBird (Zaheer et al., NeurIPS 2020, arXiv:2007.14062): Longformer and random blocks."""

from __future__ import annotations

from typing import Annotated

from ...arguments import Range
from ...parameters import Seed
from ..sparse import Few, Window
from .longformer import Longformer


class BigBird(Longformer):
    """Longformer's window and global positions, and `random` blocks of a window's size for each block of queries.

    Which blocks is drawn once, from the seed, the block's number and nothing else; in a causal model from those before.
    A block that is drawn twice, or lies in the window, counts once.

    window: how far, the position itself included; also the size of the blocks.
    global_tokens: how many global positions there are at the beginning.
    random: blocks drawn for each block.
    seed: of the draw.
    """

    kind = "mixer.bigbird"
    paper = "arXiv:2007.14062"
    limit = "with a window of all positions, or all of them global, it is softmax attention"

    def __init__(
        self, width: int, heads: int, head_size: int, causal: bool, layer: int, *, window: Window = 32,
        global_tokens: Few = 2, random: Annotated[int, Range(0, 1024)] = 3, seed: Seed = 0,
    ) -> None:  # fmt: skip
        super().__init__(width, heads, head_size, causal, window=window, global_tokens=global_tokens)
        self.random, self.seed = random, seed + layer
