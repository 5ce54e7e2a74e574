"""What an edit changes, written down before it is changed, so that it can be taken back bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy, Matrix, record_of
from ..anatomy.storage import describe
from ..version import __version__
from .patch import Part, Patch, product


class Journal:
    """Every change of an edit goes through it.

    before: the parameters as they were, by name, in their own dtype, on the CPU. config: entries of the model's config
    as they were. added: names of parameters that the model did not have.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._forget()

    def _forget(self) -> None:
        self.before: dict[str, Tensor] = {}
        self.config: dict[str, Any] = {}
        self.added: list[str] = []
        self.matrices: dict[str, Matrix] = {}
        self.tensors: list[str] = []  # parameters that were changed as a whole, by name
        self._dense: dict[str, Tensor] = {}  # matrices as they were, for the size of the change
        self._kinds: dict[str, str] = {}  # how a matrix or parameter was changed, see `Part`
        self._numbers: dict[str, dict[str, Tensor]] = {}
        self._sums: dict[str, Tensor] = {}  # of the factors added to a matrix so far
        self._biases: list[str] = []  # matrices that were asked to have a bias
        self._noted: dict[str, Any] | None = None

    def write(self, matrix: Matrix, weight: Tensor, bias: Tensor | None = None) -> None:
        """Overwrite a matrix W (d_out x d_in), and its bias if given.

        Raises TransectError where it is not stored as a dense matrix, or the shape is another; then nothing changed.
        """
        self.keep(matrix)
        matrix.write(weight, bias)

    def keep(self, matrix: Matrix) -> None:
        """Note a matrix that is about to be changed in place."""
        self._begin(matrix)
        self._kinds[matrix.name] = "whole"

    def add(self, matrix: Matrix, left: Tensor, right: Tensor) -> None:
        """Add left @ right (d_out x r and r x d_in) to a matrix; what was added before stays.

        The sum of all is rounded once. Factors are kept in float32, of a float64 model in float64. Raises as `write`.
        """
        self._begin(matrix)
        name, before = matrix.name, self._dense[matrix.name]
        dtype = torch.float64 if before.dtype == torch.float64 else torch.float32
        left, right = left.detach().to("cpu", dtype), right.detach().to("cpu", dtype)
        if self._kinds.setdefault(name, "factors") != "factors":
            self.write(matrix, matrix.weight.cpu().double() + product(left, right))
            return
        total = self._sums[name] = product(
            left, right, self._sums.get(name, torch.zeros_like(before, dtype=torch.float64))
        )
        earlier = self._numbers.get(name)
        self._numbers[name] = {
            "left": left if earlier is None else torch.cat([earlier["left"], left], 1),
            "right": right if earlier is None else torch.cat([earlier["right"], right]),
        }
        matrix.write((before.double() + total).to(before.dtype).to(matrix.weight.device))

    def set_rows(self, matrix: Matrix, rows: Tensor, values: Tensor, bias: Tensor | None = None) -> None:
        """Set rows of a matrix (indices, and len(rows) x d_in), and if given their biases. Raises as `write`."""
        self._begin(matrix)
        weight, whole = matrix.weight.clone(), matrix.bias
        weight[rows] = values.to(weight)
        if bias is not None and whole is not None:
            whole = whole.clone()
            whole[rows] = bias.to(whole)
        if self._kinds.setdefault(matrix.name, "rows") != "rows" or matrix.name in self._numbers:
            self._kinds[matrix.name] = "whole"
        numbers = {"rows": rows.cpu(), "values": weight[rows].cpu()}
        self._numbers[matrix.name] = numbers | ({} if bias is None else {"bias": bias.cpu()})
        matrix.write(weight, whole if bias is not None else None)

    @torch.no_grad()
    def shift(self, name: str, difference: Tensor) -> None:
        """Add a tensor to a parameter, of whatever shape, that is stored as floating-point numbers; once."""
        parameter = self.model.get_parameter(name)
        before = self.before.setdefault(name, parameter.detach().cpu().clone())
        difference = difference.detach().cpu()
        self._kinds[name], self._numbers[name] = "difference", {"difference": difference}
        self.tensors.append(name)
        parameter.copy_((before.double() + difference.double()).to(before.dtype))

    def _begin(self, matrix: Matrix) -> None:
        if matrix.name in self.matrices:
            return
        self.matrices[matrix.name] = matrix
        self._dense[matrix.name] = matrix.weight.detach().cpu().clone()
        for parameter in matrix.module.parameters():
            name = self._name_of(parameter)
            if name not in self.added:
                self.before.setdefault(name, parameter.detach().cpu().clone())

    def add_bias(self, matrix: Matrix) -> None:
        """Give a matrix that has none a bias of zeros. The matrix itself need not be kept for that."""
        module = matrix.module
        self._biases.append(matrix.name)
        if module.bias is None:
            module.bias = nn.Parameter(torch.zeros(module.weight.shape[0]).to(module.weight), requires_grad=False)
            self.added.append(self._name_of(module.bias))
            _describe_again(self.model, self.added[-1:])

    def set_config(self, name: str, value: Any) -> None:
        """Change an entry of the model's config."""
        self.config.setdefault(name, getattr(self.model.config, name))
        setattr(self.model.config, name, value)

    def repeat(self, patch: Patch) -> None:
        """Do what an edit did, on the weights as they are now. The patch must be one that can be repeated."""
        known = {matrix.name: matrix for matrix in Anatomy(self.model).matrices()}
        for name in patch.biases:
            self.add_bias(known[name])
        for name, (_, value) in patch.config.items():
            self.set_config(name, value)
        for name, part in patch.matrices.items():
            numbers = part.numbers
            if part.kind == "factors":
                self.add(known[name], numbers["left"], numbers["right"])
            else:
                self.set_rows(known[name], numbers["rows"], numbers["values"], numbers.get("bias"))
        for name, part in patch.tensors.items():
            if part.kind == "difference":
                self.shift(name, part.numbers["difference"])

    def note(self, name: str, settings: dict[str, Any], called: str) -> None:
        """Write the finished edit into the model's history, so that an adapter trained on it names this model.

        called: the name by which it can be taken back.
        """
        self._noted = {"transect": __version__, "edit": name, "name": called, "settings": settings}
        record_of(self.model).history.append(self._noted)

    @torch.no_grad()
    def undo(self) -> None:
        """Everything as it was, bit for bit."""
        restore(self.model, self.before, self.config, self.added)
        history = record_of(self.model).history
        if self._noted in history:
            history.remove(self._noted)
        self._forget()

    def patch(self) -> Patch:
        """All that was changed, small."""
        made = Patch(
            added=list(self.added), biases=list(self._biases),
            config={name: (before, getattr(self.model.config, name)) for name, before in self.config.items()},
        )  # fmt: skip
        for name, matrix in self.matrices.items():
            kind, after = self._kinds[name], matrix.weight.detach().cpu()
            numbers = {} if kind == "whole" else self._numbers[name]
            made.matrices[name] = Part.of(kind, numbers, self._dense[name], after)
        in_matrices = {id(matrix.module.weight) for matrix in self.matrices.values()}
        for name, before in self.before.items():
            parameter = self.model.get_parameter(name)
            if id(parameter) not in in_matrices:
                after = parameter.detach().cpu()
                made.tensors[name] = Part.of(self._kinds.get(name, "whole"), self._numbers.get(name, {}), before, after)
        return made

    def changed(self) -> list[str]:
        """Names of the parameters whose numbers are others than before, and of those that were added."""
        now = {name: self.model.get_parameter(name).detach().cpu() for name in self.before}
        return [*(name for name, before in self.before.items() if not torch.equal(before, now[name])), *self.added]

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


def step_back(anatomy: Anatomy, patch: Patch) -> None:
    """Put a model back to where it was before the edit that made the patch, bit for bit.

    BadCheckpoint where the patch is damaged; then nothing has changed.
    """
    known = {matrix.name: matrix for matrix in anatomy.matrices()}
    tensors = {name: part.before(anatomy.model.get_parameter(name)) for name, part in patch.tensors.items()}
    matrices = {name: part.before(known[name].weight) for name, part in patch.matrices.items()}
    for name, weight in matrices.items():
        known[name].write(weight.to(known[name].weight.device))
    restore(anatomy.model, tensors, {name: before for name, (before, _) in patch.config.items()}, patch.added)


def _describe_again(model: Any, added: list[str]) -> None:
    """Let the structure record say whether the modules that it names have a bias now."""
    record = record_of(model)
    for path in list(record.modules):
        if any(name.startswith(f"{path}.") for name in added):
            record.set_module(path, describe(model.get_submodule(path)))
