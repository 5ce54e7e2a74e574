"""2:4 sparsity: of every four consecutive entries of a row, two are stored, with their positions."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..anatomy.storage import parameter_of
from .expanded import Expanded


class SemiStructured(Expanded):
    """y = Ŵx + b, where Ŵ (d_out x d_in) has at most two non-zeros in every group of four entries of a row.

    values (d_out x 2g) are the two entries of each of the g groups of a row, the last group filled up with columns of
    zeros where 4 does not divide d_in. positions (uint8) says where they stand: see `pack_positions`.

    How it computes is told by `kernel`. "semi-structured": PyTorch's 2:4 kernels, on an NVIDIA GPU that has them, in
    half precision, for shapes that they take, and where no gradient is needed. "dense": a dense Ŵ, made at the first
    call and kept until the values change, move or are trained; that costs a dense matrix of memory, and is no faster
    than one. Neither form is stored or counted. Under torch.compile Ŵ is dense and made in every call.
    """

    kind = "semi_structured"

    def __init__(self, d_in: int, d_out: int, bias: bool) -> None:
        super().__init__(d_in, d_out)
        groups = -(-d_in // 4)
        self.values = nn.Parameter(torch.empty(d_out, 2 * groups))
        self.register_buffer("positions", torch.zeros((d_out * groups + 1) // 2, dtype=torch.uint8))
        self.register_parameter("bias", nn.Parameter(torch.empty(d_out)) if bias else None)

    positions: Tensor

    @classmethod
    def from_dense(cls, weight: Tensor, mask: Tensor) -> SemiStructured:
        """The entries of W (d_out x d_in) that a mask keeps: bool (d_out x 4g), two of every four, padding included."""
        d_out, d_in = weight.shape
        operator = cls(d_in, d_out, False).to(weight)
        padded = nn.functional.pad(weight.detach(), (0, mask.shape[1] - d_in))
        operator.positions = pack_positions(mask)
        operator.values = parameter_of(padded[mask].view(d_out, -1))
        return operator

    @property
    def kernel(self) -> Literal["dense", "semi-structured"]:
        """How it computes where it is now, in its present dtype, when no gradient is needed."""
        return "dense" if self._sparse_type() is None else "semi-structured"

    def to_dense(self) -> Tensor:
        d_out, groups = self.out_features, self.values.shape[1] // 2
        index = unpack_positions(self.positions, d_out * groups).view(d_out, groups, 2)
        spread = self.values.new_zeros(d_out, groups, 4).scatter(-1, index, self.values.view(d_out, groups, 2))
        return spread.flatten(1)[:, : self.in_features].contiguous()

    def _sparse_type(self) -> Any:
        """The class of PyTorch's sparse tensors that fits, or None. 32 and 64 are what both of its back ends take."""
        device, (d_out, d_in) = self.values.device, (self.out_features, self.in_features)
        half = self.values.dtype in (torch.float16, torch.bfloat16)
        if device.type != "cuda" or torch.version.hip or not half or d_out % 32 or d_in % 64:
            return None
        major = torch.cuda.get_device_capability(device)[0]
        if torch.backends.cusparselt.is_available() and major >= 8:
            return torch.sparse.SparseSemiStructuredTensorCUSPARSELT
        return torch.sparse.SparseSemiStructuredTensorCUTLASS if major == 8 else None

    @property
    def sources(self) -> tuple[Tensor, ...]:
        return self.values, self.positions

    def form(self) -> Tensor:
        sparse_type = self._sparse_type()
        return self.to_dense() if sparse_type is None else sparse_type.from_dense(self.to_dense())

    @property
    def flops(self) -> int:
        """Of the stored entries alone; the dense form does twice as many."""
        return 2 * self.values.numel()

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind, "in": self.in_features, "out": self.out_features, "bias": self.bias is not None,
        }  # fmt: skip

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> SemiStructured:
        return cls(description["in"], description["out"], description["bias"])


def semi_structured_bytes(d_out: int, d_in: int, itemsize: int) -> int:
    """What `SemiStructured` stores of a matrix: two entries of every four, and four bits."""
    groups = d_out * -(-d_in // 4)
    return 2 * groups * itemsize + (groups + 1) // 2


def pack_positions(mask: Tensor) -> Tensor:
    """Where the two kept entries of each group of four stand, row by row: two bits each, so two groups a byte.

    mask: bool (d_out x 4g), two true in every four. The first entry's position is in the lower bits, the first group
    in the lower half of the byte.
    """
    places = mask.reshape(-1, 4).nonzero()[:, 1].view(-1, 2)
    nibbles = places[:, 0] + 4 * places[:, 1]
    nibbles = nn.functional.pad(nibbles, (0, len(nibbles) % 2))
    return (nibbles[0::2] + 16 * nibbles[1::2]).to(torch.uint8)


def unpack_positions(packed: Tensor, groups: int) -> Tensor:
    """The inverse of `pack_positions`: positions from 0 to 3 (groups x 2)."""
    nibbles = torch.stack([packed & 15, packed >> 4], dim=1).flatten()[:groups]
    return torch.stack([nibbles & 3, nibbles >> 2], dim=1).long()
