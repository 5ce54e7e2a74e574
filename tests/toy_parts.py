"""Parts for tests of slots; a test names them while it runs."""

import torch
from torch import nn

from transect.parts import BlockPart, Inside, MatrixPart


class Gated(BlockPart):
    """s * (what the block adds)."""

    paper, limit = "none", "with s = 1 it is the block"

    def __init__(self, width: int, *, start: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((width,), start))

    def forward(self, x, inside: Inside):
        return x + self.scale * (inside.block(x) - x)


class Apart(BlockPart):
    """A pre-norm block put together by hand."""

    paper, limit = "none", "it is the block"

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x, inside: Inside):
        first, second = inside.norms
        x = x + inside.attention(first(x))
        return x + inside.mlp(second(x))


class Sine(MatrixPart):
    """sin(W x)."""

    paper, limit = "none", "never"

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__(inputs, outputs, bias)
        self.inner = nn.Linear(inputs, outputs, bias=bias)

    def forward(self, x):
        return self.inner(x).sin()
