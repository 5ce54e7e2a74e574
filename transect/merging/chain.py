"""Weight matching of plain networks: linear layers with element-wise functions in between."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import TransectError
from .matching import Matched, RowUnit, match

ELEMENTWISE = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.Softplus, nn.Identity,
               nn.Dropout)  # fmt: skip


class Neurons(RowUnit):
    """The neurons between two linear layers: rows and bias of the first, columns of the second."""

    def __init__(self, a: tuple[nn.Linear, nn.Linear], b: tuple[nn.Linear, nn.Linear]) -> None:
        self.a, self.b = a, b

    def rows(self) -> list[tuple[Tensor, Tensor]]:
        """d x d_in, d x 1 and d x d_out."""
        return list(zip(_touched(*self.a), _touched(*self.b), strict=True))

    @torch.no_grad()
    def put(self, order: Sequence[int]) -> None:
        """Re-order them in B."""
        index = torch.as_tensor(order)
        for tensor in _touched(*self.b):
            tensor.copy_(tensor[index])


def _touched(before: nn.Linear, after: nn.Linear) -> list[Tensor]:
    """Views of the tensors that the neurons between two layers index, with the neurons first."""
    biases = [] if before.bias is None else [before.bias.detach()[:, None]]
    return [before.weight.detach(), *biases, after.weight.detach().T]


def linear_layers(network: nn.Sequential) -> list[nn.Linear]:
    """The linear layers in order; TransectError for anything else that is not element-wise."""
    for name, module in network.named_children():
        if not isinstance(module, (nn.Linear, *ELEMENTWISE)):
            raise TransectError(
                f"layer {name} is a {type(module).__name__}: neurons can change places where between the linear "
                "layers there are element-wise functions alone"
            )
    return [module for module in network if isinstance(module, nn.Linear)]


def units_of_chain(a: nn.Sequential, b: nn.Sequential) -> list[Neurons]:
    """The hidden layers' neurons; TransectError where the networks do not fit."""
    first, second = linear_layers(a), linear_layers(b)
    shapes = [[tuple(one.weight.shape) for one in layers] for layers in (first, second)]
    if shapes[0] != shapes[1]:
        raise TransectError(f"the layers of the two networks do not fit: {shapes[0]} and {shapes[1]}")
    return [Neurons((first[i], first[i + 1]), (second[i], second[i + 1])) for i in range(len(first) - 1)]


def match_chain(a: nn.Sequential, b: nn.Sequential, seed: int = 0) -> tuple[nn.Sequential, Matched]:
    """A copy of B with its neurons in the order in which its weights lie closest to A's; its function is the same."""
    moved = copy.deepcopy(b)
    return moved, match(units_of_chain(a, moved), torch.Generator().manual_seed(seed))
