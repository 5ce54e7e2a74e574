"""Which of a model's parameters a pass reads: those that are active, where experts or blocks are chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..operators import Operator


class ParametersRead(TorchDispatchMode):
    """Inside the `with`, notes what is read of the model's parameters; `count` says how many that were.

    A view of a parameter reads nothing; what then computes with the view reads the numbers in it, and a look-up those
    that it looks up. A number counts once, however often it is read, such as in a loop. An operator reads all of its
    own, those in codes among them, also where it runs in a kernel that nothing else sees.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._stored: dict[int, list[Tensor]] = {}
        for parameter in model.parameters():
            self._stored.setdefault(_where(parameter), []).append(parameter)
        self._whole: set[int] = set()  # storages of which every number was read
        self._parts: dict[int, Tensor] = {}  # of others: which numbers were
        self._tables: set[int] = set()  # storages that rows were looked up in, of which others may be at the next token
        self._operators: set[nn.Module] = set()
        self._handles: list[Any] = []

    def __enter__(self) -> ParametersRead:
        for module in self.model.modules():
            if isinstance(module, Operator):
                self._handles.append(module.register_forward_pre_hook(self._runs))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        made = {_where(tensor) for tensor in _tensors(output)}
        for tensor in _tensors([args, kwargs]):
            where = _where(tensor)
            if where in self._stored and where not in made and where not in self._whole:
                self._note(where, tensor, func, args, kwargs or {})
        return output

    @property
    def count(self) -> int:
        """How many parameters were read, those that are stored as codes among them."""
        read = sum(module.coded for module in self._operators if isinstance(module, Operator))
        own = {id(parameter) for module in self._operators for parameter in module.parameters()}
        for where, parameters in self._stored.items():
            for parameter in parameters:
                if where in self._whole or id(parameter) in own:
                    read += parameter.numel()
                elif where in self._parts:
                    read += int(_inside(self._parts[where], parameter).sum())
        return read

    @property
    def everything(self) -> bool:
        """Whether nothing is left to read but rows of tables: another token can read no more and no less."""
        own = {_where(parameter) for module in self._operators for parameter in module.parameters()}
        coded = {module for module in self.model.modules() if isinstance(module, Operator)}
        return coded == self._operators and self._stored.keys() == self._whole | self._tables | own

    def _runs(self, module: nn.Module, args: Any) -> None:
        self._operators.add(module)

    def _note(self, where: int, tensor: Tensor, func: Any, args: Any, kwargs: Any) -> None:
        stored = self._stored[where][0]
        size = stored.untyped_storage().nbytes() // stored.element_size()
        place, look_up = _LOOK_UPS.get(func.name().split(".")[0], (-1, None))
        if look_up is not None and args[place] is not tensor:
            look_up = None
        if tensor.dtype != stored.dtype or (look_up is None and tensor.numel() >= size):
            self._whole.add(where)
            self._parts.pop(where, None)
            return
        if where not in self._parts:
            self._parts[where] = torch.zeros(size, dtype=torch.bool, device=tensor.device)
        if look_up is _rows:
            self._tables.add(where)
        seen = _inside(self._parts[where], tensor)
        if look_up is None:
            seen.fill_(True)
        else:
            look_up(seen, *args, **kwargs)


def _rows(seen: Tensor, weight: Tensor, indices: Tensor, *rest: Any) -> None:
    seen[indices] = True


def _selected(seen: Tensor, tensor: Tensor, dim: int, indices: Tensor) -> None:
    seen.index_fill_(dim, indices, True)


def _indexed(seen: Tensor, tensor: Tensor, indices: list[Tensor | None]) -> None:
    seen[tuple(slice(None) if one is None else one for one in indices)] = True


def _gathered(seen: Tensor, tensor: Tensor, dim: int, indices: Tensor, **rest: Any) -> None:
    seen.scatter_(dim, indices, True)


def _grouped(seen: Tensor, x: Tensor, weights: Tensor, offs: Tensor, *rest: Any, **more: Any) -> None:
    """Of weights of groups (G x m x n), those that have rows of x; offs (G): where each group's rows end."""
    seen[offs.diff(prepend=offs.new_zeros(1)) > 0] = True


# What computes with some numbers of a tensor only: which of its arguments that is, and how they are noted in a tensor
# of its shape.
_LOOK_UPS: dict[str, tuple[int, Callable[..., None]]] = {
    "aten::embedding": (0, _rows), "aten::index_select": (0, _selected), "aten::index": (0, _indexed),
    "aten::gather": (0, _gathered), "aten::_grouped_mm": (1, _grouped),
    "transformers::grouped_mm_fallback": (1, _grouped),
}  # fmt: skip


def _where(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _inside(stored: Tensor, view: Tensor) -> Tensor:
    """The part of what is noted of a storage that a view of the storage shows, each number once."""
    sizes = [1 if stride == 0 else size for size, stride in zip(view.shape, view.stride(), strict=True)]
    return stored.as_strided(sizes, view.stride(), view.storage_offset())


def _tensors(values: Any) -> list[Tensor]:
    """All tensors in nested arguments."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = list(values.values())
    return [one for value in values for one in _tensors(value)] if isinstance(values, (list, tuple)) else []
