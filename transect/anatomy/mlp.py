"""An MLP sublayer, by neurons."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..errors import TransectError
from .matrix import Home, Matrix
from .surgery import keep_rows_and_columns


class MLP:
    """An MLP sublayer: down(activation(up x)), or down(activation(gate x) * up x). Its hidden units are neurons."""

    def __init__(self, block: Home) -> None:
        self.block = block
        self.up, self.down = block.matrix("up"), block.matrix("down")
        try:
            self.gate: Matrix | None = block.matrix("gate")
        except KeyError:
            self.gate = None

    @property
    def neurons(self) -> int:
        """Number of hidden units."""
        return self.up.shape[0]

    @property
    def activation(self) -> nn.Module | None:
        """The module between up and down, or None where the architecture names none."""
        path = self.block.anatomy.architecture.activation
        return None if path is None else self.block.module.get_submodule(path)

    @property
    def can_narrow(self) -> bool:
        """Whether neurons can be taken away: the activation holds no numbers of each (see `parts.Activation`)."""
        return not getattr(self.activation, "of_neurons", False)

    def refuse_narrowing(self) -> None:
        """Raise an error where no neuron can be taken away, or put in another's place."""
        if not self.can_narrow:
            raise TransectError(
                f"the activation of block {self.block.index}, {type(self.activation).__name__}, depends on "
                "which neurons are there, so that none can be taken away; take a method that replaces matrices"
            )

    def keep(self, neurons: Iterable[int]) -> None:
        """Keep these neurons, in this order (so a permutation is a special case)."""
        self.refuse_narrowing()
        kept = torch.as_tensor(list(neurons) if not isinstance(neurons, Tensor) else neurons, dtype=torch.long)
        if kept.numel() == 0:
            raise TransectError("at least one neuron must be kept; to remove the sublayer use mlp.drop()")
        if kept.unique().numel() != kept.numel() or int(kept.min()) < 0 or int(kept.max()) >= self.neurons:
            raise TransectError(f"neurons to keep must be distinct numbers from 0 to {self.neurons - 1}")
        self._keep(kept)

    def _keep(self, kept: Tensor) -> None:
        rows = {"up": kept} if self.gate is None else {"gate": kept, "up": kept}
        keep_rows_and_columns(self.block, rows, {"down": kept})

    def drop(self) -> None:
        """Remove the sublayer: no neuron is left and the output bias is gone, so that it adds nothing."""
        self.block.refuse_dropping_sublayers()
        self._keep(torch.empty(0, dtype=torch.long))
        with torch.no_grad():
            if self.down.module.bias is not None:
                self.down.module.bias.zero_()
