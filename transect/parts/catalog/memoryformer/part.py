"""MemoryFormer: rows of tables, found by the signs of the input, in the place of matrices (Ding et al., NeurIPS 2024,
arXiv:2411.12992).

The input is cut into K chunks of τ numbers; the signs of a chunk are the address of a row in its table of 2^τ, and the
output is the sum of these rows, each times a weight through which the gradient reaches the input. For each output that
is K multiply-adds where a matrix takes τ K, and K 2^τ numbers, of which K are read, where it has τ K.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ....arguments import Range
from ....errors import TransectError
from ...part import MatrixPart, MLPPart

RowWeight = Literal["scaled", "probability"]
AddressBits = Annotated[int, Range(1, 16)]
SoftmaxTemperature = Annotated[float, Range(0, above=True)]


def row_weights(z: Tensor, temperature: float, weight: RowWeight) -> Tensor:
    """The weight of each chunk's row. z: (... x K x τ); in float32 or wider.

    probability: p(z), the share that the signs of z have in softmax(<z, s> / temperature) over all 2^τ vectors s of
    signs: 1 / Π_i (1 + exp(-2 |z_i| / temperature)) (Section 2.1). scaled: ||z||_1 p(z), as the authors' code has it.
    """
    size = (z if z.dtype == torch.float64 else z.float()).abs()
    p = (-functional.softplus(-2 * size / temperature).sum(-1)).exp()
    return p * size.sum(-1) if weight == "scaled" else p


class Tables(nn.Module):
    """x (..., inputs) -> (..., outputs): Σ_k weight(z_k) T_k[address of z_k], with the chunks z_k of x.

    inputs: a multiple of bits. Bit i of an address is whether z_i >= 0.
    """

    def __init__(
        self, inputs: int, outputs: int, bits: int, *, weight: RowWeight, temperature: float, bias: bool = True
    ) -> None:
        super().__init__()
        if inputs % bits:
            raise TransectError(f"{inputs} inputs are no whole number of chunks of {bits}: choose other bits")
        self.inputs, self.bits, self.temperature = inputs, bits, temperature
        self.kind: RowWeight = weight
        self.tables = nn.Parameter(torch.randn(inputs // bits * 2**bits, outputs) * 0.02)  # T_1, T_2, ... on end
        self.bias = nn.Parameter(torch.randn(outputs) * 0.001) if bias else None

    def addressed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Which rows of `tables` are read, and their weights: (positions x K) each. x: (positions x inputs)."""
        z = x.unflatten(-1, (-1, self.bits))
        powers = 2 ** torch.arange(self.bits, device=x.device)
        rows = ((z >= 0) * powers).sum(-1)
        first = 2**self.bits * torch.arange(z.shape[-2], device=x.device)  # of each table
        return rows + first, row_weights(z, self.temperature, self.kind)

    def forward(self, x: Tensor) -> Tensor:
        rows, weights = self.addressed(x.flatten(0, -2))
        tables = self.tables
        y = functional.embedding_bag(rows, tables, mode="sum", per_sample_weights=weights.to(tables.dtype))
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).unflatten(0, x.shape[:-1])

    @property
    def flops(self) -> int:
        """Operations for one position: the sum of the rows, and about 4 for the weight of each input."""
        return 2 * (self.inputs // self.bits) * self.tables.shape[1] + 4 * self.inputs


class MemoryMatrix(MatrixPart):
    """Rows of tables, found by the signs of the input in chunks, summed.

    It stores 2^bits / bits times the numbers of the matrix, and reads 1 / bits of them.

    bits: of an address, which are the inputs in a chunk; it divides the inputs.
    weight: of a row: scaled is the sum of the chunk's sizes times the probability of its signs, as in the authors'
        code, to which the start and the learning rate (3 times the usual) belong; probability is that alone, as in
        their paper.
    temperature: of the probability.
    norm: bring the input to mean 0 and variance 1 first, without which few of the rows are used; off where that is done
        in front of it.
    """

    kind = "matrix.memoryformer"
    paper = "arXiv:2411.12992"
    limit = "none, but for a weight |x| that is not offered: with one bit it would be any matrix"

    def __init__(
        self, inputs: int, outputs: int, bias: bool, *, bits: AddressBits = 8, weight: RowWeight = "scaled",
        temperature: SoftmaxTemperature = 1.0, norm: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(inputs, outputs, bias)
        self.norm = norm
        self.inner = Tables(inputs, outputs, bits, weight=weight, temperature=temperature, bias=bias)

    def hashed(self, x: Tensor) -> Tensor:
        """What the tables see of x."""
        return functional.layer_norm(x, x.shape[-1:]) if self.norm else x

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.hashed(x))

    @property
    def flops(self) -> int:
        return self.inner.flops + (8 * self.in_features if self.norm else 0)


class MemoryMLP(MLPPart):
    """Two layers of tables with a norm between them and no other function (Section 2.3).

    The middle is (bits + 2) width / bits wide, whatever the number of neurons. The norm of the block must be one that
    centres, or nearly: the first layer reads signs.

    bits: of an address of the first layer; it divides the width. The second has 2 more.
    weight: of a row; scaled is the sum of the chunk's sizes times the probability of its signs, as in the authors'
        code, to which the start and the learning rate (3 times the usual) belong; probability is that alone.
    temperature: of the probability.
    """

    kind = "mlp.memoryformer"
    paper = "arXiv:2411.12992"
    limit = "none"

    def __init__(
        self, width: int, *, bits: Annotated[int, Range(1, 14)] = 8, weight: RowWeight = "scaled",
        temperature: SoftmaxTemperature = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        middle = (bits + 2) * (width // bits)
        self.first = Tables(width, middle, bits, weight=weight, temperature=temperature)
        self.norm = nn.LayerNorm(middle)
        self.second = Tables(middle, width, bits + 2, weight=weight, temperature=temperature)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)).to(x.dtype))

    @property
    def flops(self) -> int:
        return self.first.flops + self.second.flops + 8 * self.second.inputs
