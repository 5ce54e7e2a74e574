"""What an edit changes, written down before it is changed, so that it can be taken back bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Matrix, record_of
from ..anatomy.storage import describe
from ..version import __version__


class Journal:
    """Every change of an edit goes through it.

    before: the parameters as they were, by name, in their own dtype, on the CPU. config: entries of the model's config
    as they were. added: names of parameters that the model did not have.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.before: dict[str, Tensor] = {}
        self.config: dict[str, Any] = {}
        self.added: list[str] = []
        self.matrices: dict[str, Matrix] = {}
        self.tensors: list[str] = []  # parameters that were changed as a whole, by name
        self._dense: dict[str, Tensor] = {}  # matrices as they were, for the size of the change
        self._noted: dict[str, Any] | None = None

    def write(self, matrix: Matrix, weight: Tensor, bias: Tensor | None = None) -> None:
        """Overwrite a matrix W (d_out x d_in), and its bias if given.

        Raises TransectError where it is not stored as a dense matrix, or the shape is another; then nothing changed.
        """
        self.keep(matrix)
        matrix.write(weight, bias)

    def keep(self, matrix: Matrix) -> None:
        """Note a matrix that is about to be changed in place."""
        if matrix.name in self.matrices:
            return
        self.matrices[matrix.name] = matrix
        self._dense[matrix.name] = matrix.weight.detach().cpu().clone()
        for parameter in matrix.module.parameters():
            name = self._name_of(parameter)
            if name not in self.added:
                self.before.setdefault(name, parameter.detach().cpu().clone())

    @torch.no_grad()
    def put(self, name: str, value: Tensor) -> None:
        """Overwrite a parameter, of whatever shape, that is stored as floating-point numbers."""
        parameter = self.model.get_parameter(name)
        self.before.setdefault(name, parameter.detach().cpu().clone())
        self.tensors += [name] * (name not in self.tensors)
        parameter.copy_(value)

    def add_bias(self, matrix: Matrix) -> None:
        """Give a matrix that has none a bias of zeros. The matrix itself need not be kept for that."""
        module = matrix.module
        if module.bias is None:
            module.bias = nn.Parameter(torch.zeros(module.weight.shape[0]).to(module.weight), requires_grad=False)
            self.added.append(self._name_of(module.bias))
            _describe_again(self.model, self.added[-1:])

    def set_config(self, name: str, value: Any) -> None:
        """Change an entry of the model's config."""
        self.config.setdefault(name, getattr(self.model.config, name))
        setattr(self.model.config, name, value)

    def note(self, name: str, settings: dict[str, Any]) -> None:
        """Write the finished edit into the model's history, so that an adapter trained on it names this model."""
        self._noted = {"transect": __version__, "edit": name, "settings": settings}
        record_of(self.model).history.append(self._noted)

    @torch.no_grad()
    def undo(self) -> None:
        """Everything as it was, bit for bit."""
        restore(self.model, self.before, self.config, self.added)
        if self._noted is not None:
            record_of(self.model).history.remove(self._noted)
            self._noted = None
        self.before, self.config, self.added, self.matrices, self._dense = {}, {}, [], {}, {}
        self.tensors = []

    def changes(self) -> list[dict[str, Any]]:
        """For each changed tensor: Frobenius norms of the change and of what it was, and the rank of the change."""
        pairs = [(name, self._dense[name], matrix.weight) for name, matrix in self.matrices.items()]
        pairs += [(name, self.before[name], self.model.get_parameter(name)) for name in self.tensors]
        rows = []
        for name, before, after in pairs:
            before = before.double()
            difference = after.detach().cpu().double() - before
            matrix = difference.dim() == 2 and bool(difference.any())
            rows.append(
                {
                    "matrix": name,
                    "change": float(difference.norm()),
                    "relative": float(difference.norm() / before.norm().clamp_min(1e-300)),
                    "rank": int(torch.linalg.matrix_rank(difference, rtol=1e-3)) if matrix else int(difference.any()),
                    "entries": float((difference != 0).double().mean()),
                }
            )
        return rows

    def _name_of(self, parameter: Tensor) -> str:
        return next(name for name, one in self.model.named_parameters() if one is parameter)


@torch.no_grad()
def restore(model: Any, before: dict[str, Tensor], config: dict[str, Any], added: list[str]) -> None:
    """Put parameters and config entries back, and take away what was added."""
    for name in added:
        path, _, last = name.rpartition(".")
        setattr(model.get_submodule(path), last, None)
    _describe_again(model, added)
    for name, tensor in before.items():
        model.get_parameter(name).copy_(tensor)
    for name, value in config.items():
        setattr(model.config, name, value)


def _describe_again(model: Any, added: list[str]) -> None:
    """Let the structure record say whether the modules that it names have a bias now."""
    record = record_of(model)
    for path in list(record.modules):
        if any(name.startswith(f"{path}.") for name in added):
            record.set_module(path, describe(model.get_submodule(path)))
