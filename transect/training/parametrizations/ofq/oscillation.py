"""The probe of oscillation: which weights of a quantized training go to and fro between two levels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MOMENTUM = 0.01  # of the average over steps; the authors'
THRESHOLD = 0.02  # above it a weight counts as oscillating: 2 to 3 times the momentum


class Oscillation(nn.Module):
    """How often each weight turns back: it is shown the integer codes after every step of any quantized training.

    A turn is a change of the code opposite to its last change. frequency: of turns per step, an exponential average.
    What it holds, seven bytes a weight, is in buffers.

    codes: integers of at most 8 bits (of any shape), as they are at the start.
    """

    codes: Tensor
    direction: Tensor
    frequency: Tensor

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes.to(torch.int16))
        self.register_buffer("direction", torch.zeros_like(codes, dtype=torch.int8))
        self.register_buffer("frequency", torch.zeros_like(codes, dtype=torch.float32))

    @torch.no_grad()
    def see(self, codes: Tensor) -> None:
        """Note what a step has changed."""
        codes = codes.to(torch.int16)
        change = (codes - self.codes).sign().to(torch.int8)
        self.frequency.lerp_((change * self.direction == -1).float(), MOMENTUM)
        self.direction.copy_(torch.where(change != 0, change, self.direction))
        self.codes.copy_(codes)

    def oscillating(self) -> int:
        """How many weights turn back at more than `THRESHOLD` of the steps."""
        return int((self.frequency > THRESHOLD).sum())
