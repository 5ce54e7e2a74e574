"""What a module makes of the numbers that it stores, kept between calls and made anew when they change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Remade(nn.Module):
    """Keeps one thing that it makes of some of its tensors until one of these changes, moves or is trained.

    It is neither stored nor copied nor counted. A change through `.data` cannot be seen; `train()`, `eval()` and every
    move and cast make the module forget what it has made. Of tensors made in inference mode, which do not count their
    changes, it is made in every call.
    """

    def remade(self, sources: Sequence[Tensor], make: Callable[[], T]) -> T:
        """What `make` makes, without gradients, of the sources; the one of before if they are as they were."""
        if any(tensor.is_inference() for tensor in sources):
            with torch.no_grad():
                return make()
        # Writes in place are counted; wide arithmetic for a while (`computing_wide`) shows in the dtype alone.
        made_of = [(tensor, tensor._version, tensor.dtype) for tensor in sources]
        kept = self.__dict__.get("_remade")
        if kept is None or not _same(kept[0], made_of):
            with torch.inference_mode(False), torch.no_grad():
                kept = self.__dict__["_remade"] = made_of, make()
        return kept[1]

    def _apply(self, *args: Any, **kwargs: Any) -> Self:  # every move and every cast comes here
        self.__dict__.pop("_remade", None)
        return super()._apply(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        self.__dict__.pop("_remade", None)
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:  # for copies
        return {name: value for name, value in self.__dict__.items() if name != "_remade"}


def _same(before: list[tuple[Any, ...]], now: list[tuple[Any, ...]]) -> bool:
    if len(before) != len(now):
        return False
    return all(a[0] is b[0] and a[1:] == b[1:] for a, b in zip(before, now, strict=True))
