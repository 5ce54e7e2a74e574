"""Changing activations while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor

from ..anatomy import Anatomy
from ..errors import TransectError
from .points import Reader, place

Change = Callable[[Tensor], Tensor]


@contextmanager
def changed(anatomy: Anatomy, changes: Mapping[tuple[str, int], Change]) -> Iterator[None]:
    """Replace activations in every forward pass inside the `with`, generation included.

    changes: (point, layer) -> a function from the activation to its replacement of the same shape, see `points`. It
    must not write into what it is given. With a key/value cache it is called on the new positions alone.
    Raises TransectError for a point that the model does not have. The hooks go also after an error.

        with changed(anatomy, {("mlp", 3): torch.zeros_like}):  # the MLP of block 3 adds nothing
            model(ids)
    """
    with ExitStack() as stack:
        for (point, layer), function in changes.items():
            where = place(anatomy, point, layer)
            if where is None or point == "patterns":
                raise TransectError(f"{point} {layer} cannot be changed: the model has no such point, or only shows it")
            stack.callback(Reader(where, function).remove)
        yield
