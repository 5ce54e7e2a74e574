"""A sparse dictionary of vectors: few of many features are active for each, and their directions add up to it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Dictionary(nn.Module):
    """a = relu(W_enc (x - b_dec) + b_enc), x̂ = W_dec a + b_dec; vectors of D numbers, F features.

    encoder: W_enc (F x D). encoder_bias: b_enc (F). decoder: W_dec (D x F), a column of length 1 for each feature.
    decoder_bias: b_dec (D), which is taken off before encoding.

    Kissane et al. 2024, arXiv:2406.17759, Section 2. Both matrices start in Kaiming's uniform numbers, each its own as
    in the authors' code, the columns at length 1, the biases at 0.
    """

    def __init__(self, width: int, features: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def start(rows: int, columns: int) -> Tensor:
            """What torch's kaiming_uniform_ draws for a matrix that reads `columns` numbers."""
            return (torch.rand(rows, columns, generator=generator, dtype=dtype) * 2 - 1) * (6 / columns) ** 0.5

        self.encoder = nn.Parameter(start(features, width))
        self.encoder_bias = nn.Parameter(torch.zeros(features, dtype=dtype))
        self.decoder = nn.Parameter(start(features, width).T.contiguous())
        self.decoder_bias = nn.Parameter(torch.zeros(width, dtype=dtype))
        self.normalise()

    @property
    def width(self) -> int:
        """D."""
        return self.decoder.shape[0]

    @property
    def features(self) -> int:
        """F."""
        return self.decoder.shape[1]

    def before(self, x: Tensor) -> Tensor:
        """What the features' activation function reads (... x F), of vectors (... x D)."""
        return nn.functional.linear(x - self.decoder_bias, self.encoder, self.encoder_bias)

    def encode(self, x: Tensor) -> Tensor:
        """Activations (... x F), none below 0."""
        return self.before(x).relu()

    def decode(self, a: Tensor) -> Tensor:
        """The vectors (... x D) that activations stand for."""
        return nn.functional.linear(a, self.decoder, self.decoder_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    @torch.no_grad()
    def normalise(self) -> None:
        """Columns of the decoder at length 1; one of zeros stays."""
        self.decoder.div_(_length(self.decoder))

    @torch.no_grad()
    def fold(self) -> None:
        """The same function with columns of length 1: what a column loses, its feature's activation gets."""
        length = _length(self.decoder)
        self.decoder.div_(length)
        self.encoder.mul_(length.T)
        self.encoder_bias.mul_(length[0])

    @torch.no_grad()
    def of_scaled(self, scale: float) -> None:
        """From a dictionary of s x to that of x, in place: x̂(x) becomes x̂(s x) / s, and activations a / s."""
        self.encoder_bias.div_(scale)
        self.decoder_bias.div_(scale)


def _length(decoder: Tensor) -> Tensor:
    """Of each column (1 x F); 1 for one of zeros."""
    length = decoder.norm(dim=0, keepdim=True)
    return length.where(length > 0, 1)
