"""Where norms stand in a block: before, behind or around its sublayers (Kim et al., ICML 2025, arXiv:2502.02732).

With F attention or MLP: Pre-LN x + F(N(x)), Post-LN N(x + F(x)), output-LN x + N(F(x)), and Peri-LN x + N'(F(N(x))).
Under Peri-LN, with RMSNorm, no sublayer adds a vector longer than its largest gain times √d, whatever its weights: the
stream's variance grows at most with the square of depth, and in proportion to depth where branches are uncorrelated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

from torch import Tensor, nn

from ...part import BlockPart, Inside
from ..standard_norms import RMS, Layer


class PreLN(BlockPart):
    """x + F(N(x)) with the block's own norms: what a block is without it, as a row of a contest."""

    kind = "block.pre-ln"
    paper = "arXiv:2002.04745"
    limit = "it is the block"
    places_norms = True

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor, inside: Inside) -> Tensor:
        for branch, norm in _sublayers(inside):
            x = x + branch(norm(x))
        return x


class PostLN(BlockPart):
    """N(x + F(x)) with the block's own norms behind the sums (Vaswani et al. 2017); the model's final norm stays."""

    kind = "block.post-ln"
    paper = "arXiv:1706.03762"
    limit = "none: the stream is normed at every sublayer"
    places_norms = True
    post_norm = True

    def __init__(self) -> None:
        super().__init__()

    def placed(self, norms: dict[str, nn.Module]) -> dict[str, nn.Module]:
        return _behind(norms)

    def forward(self, x: Tensor, inside: Inside) -> Tensor:
        for branch, norm in _sublayers(inside):
            x = norm(x + branch(x))
        return x


class OutputLN(BlockPart):
    """x + N(F(x)) with the block's own norms on what the sublayers give, as OLMo 2 has them."""

    kind = "block.output-ln"
    paper = "arXiv:2501.00656"
    limit = "none: every sublayer adds as much"
    places_norms = True

    def __init__(self) -> None:
        super().__init__()

    def placed(self, norms: dict[str, nn.Module]) -> dict[str, nn.Module]:
        return _behind(norms)

    def forward(self, x: Tensor, inside: Inside) -> Tensor:
        for branch, norm in _sublayers(inside):
            x = x + norm(branch(x))
        return x


class PeriLN(BlockPart):
    """x + N'(F(N(x))): a second norm, with a gain of its own that begins at 1, on what each sublayer gives.

    norm: which one that is.
    """

    kind = "block.peri-ln"
    paper = "arXiv:2502.02732"
    limit = "none: every sublayer adds as much; with output gains of 0 the block adds nothing"
    places_norms = True

    def __init__(self, width: int, eps: float, *, norm: Literal["rms", "layer"] = "rms") -> None:
        super().__init__()
        self.attention_output, self.mlp_output = ((RMS if norm == "rms" else Layer)(width, eps) for _ in range(2))

    def placed(self, norms: dict[str, nn.Module]) -> dict[str, nn.Module]:
        return {**norms, "attention_output": self.attention_output, "mlp_output": self.mlp_output}

    def forward(self, x: Tensor, inside: Inside) -> Tensor:
        for (branch, norm), behind in zip(_sublayers(inside), (self.attention_output, self.mlp_output), strict=True):
            x = x + behind(branch(norm(x)))
        return x


def _sublayers(inside: Inside) -> Iterator[tuple[Callable[[Tensor], Tensor], nn.Module]]:
    """Attention and MLP, each with the norm that the block has for it. Both exist: the frame has seen to it."""
    assert inside.attention is not None and inside.mlp is not None
    return zip((inside.attention, inside.mlp), inside.norms, strict=True)


def _behind(norms: dict[str, nn.Module]) -> dict[str, nn.Module]:
    return {name.replace("_input", "_output"): norm for name, norm in norms.items()}
