"""A model of which every matrix, or those of some roles, is trained in another parametrization, and put back after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...anatomy import Anatomy, Matrix
from ...anatomy.experts import EXPERT_ROLES, SeparateExperts
from ...anatomy.mixture import ExpertMatrix
from ...anatomy.storage import Stacked, is_dense
from ...errors import TransectError
from ...operators import Operator
from ..loop import Parameters
from .registry import Parametrization, parametrization_named
from .stand_in import StandIn

_TOGETHER = "|"  # before the names of the buffers that belong to no layer: no module's path begins with it


class Parametrized:
    """Stand-ins in the places of a model's matrices, from the start until `finish` or `detach`.

    It also serves a training by other means, such as Hugging Face's Trainer: train what `parameters` names, call
    `after_step` where the method wants it, add `penalty`, and `finish`.

    anatomy: of the model, whose matrices must be dense. method: a registered parametrization, or the name of one.
    settings: of the method. roles: only these matrices. seed: of what is drawn at the start.
    Raises TransectError if the method does not go with the model, which is then as it was.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        method: Parametrization | str,
        settings: Mapping[str, Any] | None = None,
        roles: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        self.method = parametrization_named(method) if isinstance(method, str) else method
        self.anatomy, self.base = anatomy, anatomy.model
        chosen = self.method.settings(settings or {})
        self.matrices = dense_matrices(anatomy, roles, self.method.name)
        self._layers = [(matrix, matrix.host, matrix.module) for matrix in self.matrices]  # for later
        self.stand_ins: dict[str, StandIn] = {}
        self.held_out: float | None = None
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for matrix in self.matrices:
                try:
                    made = self.method.function(matrix.weight, matrix.bias, **chosen)
                except TransectError as reason:
                    raise type(reason)(f"{self.method.name}, {matrix.name}: {reason}") from reason
                self.stand_ins[matrix.name] = made.to(matrix.weight.device)
            self.together = self.method.together(self.stand_ins, chosen)
        rest = self.base.parameters() if self.method.rest else ()
        layers = {id(p) for _, host, _ in self._layers for p in host.parameters()}
        self._rest = [(p, p.detach().to("cpu", copy=True)) for p in rest if id(p) not in layers]  # to take it back
        for matrix in self.matrices:
            matrix.place(self.stand_ins[matrix.name].train(matrix.module.training))

    @property
    def parameters(self) -> Parameters:
        """What is trained, by name; where the method trains the rest too, this asks all of it for a gradient."""
        inside = {id(p): p.requires_grad for one in self.stand_ins.values() for p in one.parameters()}
        found = {}
        for name, parameter in self.base.named_parameters():
            own = id(parameter) in inside
            if not parameter.is_floating_point() or not parameter.numel() or not (own or self.method.rest):
                continue
            if own and not inside[id(parameter)]:
                continue
            found[name] = parameter.requires_grad_(True)
        return found

    def penalty(self, again: Callable[[], Tensor]) -> Tensor | None:
        """What the method adds to the mean loss of the batch that has just run; see `Together.penalty`."""
        return self.together.penalty(again)

    def after_step(self, step: int, steps: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """To be called before the first of the steps, with 0, and after each; see `Together.after_step`."""
        self.together.after_step(step, steps, optimizer)

    def told(self) -> dict[str, float]:
        """What a user wants to know besides the losses; see `Together.told`."""
        return dict(self.together.told())

    def held(self) -> dict[str, Tensor]:
        """Buffers of the method: what goes with the numbers."""
        names = {id(one): path for path, one in self.base.named_modules() if isinstance(one, StandIn)}
        found = {
            f"{names[id(one)]}.{name}": buffer
            for one in self.stand_ins.values()
            for name, buffer in one.named_buffers()
        }
        return found | {f"{_TOGETHER}{name}": buffer for name, buffer in self.together.named_buffers()}

    def put_back(self, tensors: Mapping[str, Tensor]) -> None:
        """Buffers as `held` once gave them."""
        for full, tensor in tensors.items():
            path, _, name = full.removeprefix(_TOGETHER).rpartition(".")
            owner = (self.together if full.startswith(_TOGETHER) else self.base).get_submodule(path)
            owner._buffers[name] = tensor.to(owner.get_buffer(name).device, copy=True)

    def finish(self, measure: Callable[[], float] | None = None) -> Any:
        """Put the layers back, with the weights that the training has led to, or operators in their places; the model.

        measure: the loss on held-out text, for a method that decides something by it; `held_out` is then that of what
        is left.
        """
        self.held_out = self.together.finish(measure or (lambda: float("nan")))
        results = {name: (one.finished(), one.bias) for name, one in self.stand_ins.items()}
        self._put_layers_back()
        for matrix in self.matrices:
            result, bias = results[matrix.name]
            if isinstance(result, Operator):
                result.set_bias(bias if bias is None else bias.detach())
                matrix.replace(result.to(matrix.weight.dtype))
            else:
                matrix.write(result, bias if bias is None else bias.detach())
        return self.base

    @torch.no_grad()
    def detach(self) -> None:
        """Make the model what it was."""
        self._put_layers_back()
        for parameter, start in self._rest:
            parameter.copy_(start)

    def _put_layers_back(self) -> None:
        for matrix, host, module in self._layers:
            self.base.set_submodule(matrix.path, host)
            if isinstance(host, (Stacked, SeparateExperts)):  # what they hold was replaced in them
                matrix.place(module)


def dense_matrices(anatomy: Anatomy, roles: Sequence[str] | None, name: str) -> list[Matrix]:
    """The matrices of these roles, by default all, if each is stored entry by entry and by itself.

    name: of the method, for the error. Of a fused matrix all parts are chosen, or none.
    """
    matrices = anatomy.matrices(roles)
    uses = Counter(id(parameter) for _, parameter in anatomy.model.named_parameters(remove_duplicate=False))
    for matrix in matrices:
        if not is_dense(matrix.module):
            raise TransectError(
                f"{name} trains dense matrices, and {matrix.name} is stored as {type(matrix.module).__name__}: begin "
                "with the dense model"
            )
        if uses[id(matrix.module.weight)] > 1:
            raise TransectError(f"{name} cannot train {matrix.name}: other layers share its weight")
        parts: Sequence[str] = ()
        if not isinstance(matrix.host, (Stacked, SeparateExperts)):
            parts = EXPERT_ROLES if isinstance(matrix, ExpertMatrix) else matrix.fused.parts if matrix.fused else ()
        if roles is not None and (missing := [part for part in parts if part not in roles]):
            raise TransectError(
                f"{matrix.path} stores {', '.join(parts)} in one layer, so that they are trained together: name "
                f"{', '.join(missing)} too"
            )
    if not matrices:
        raise TransectError("the model's blocks have no matrix of these roles")
    return matrices
