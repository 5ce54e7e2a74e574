"""A linear layer of which some singular values are trained."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn
from torch.nn import functional

from ....errors import TransectError
from ...tuner import UpdateLayer
from .spectrum import chosen, decomposed, enough, tied

_SAME = 1e-6  # of the largest singular value: the rounding of the numbers in an adapter folder


class Basis(nn.Module):
    """Singular vectors, frozen: left (d_out x r), right (r x d_in). They are not saved: the weight has them."""

    left: Tensor
    right: Tensor

    def __init__(self, left: Tensor, right: Tensor) -> None:
        super().__init__()
        self.register_buffer("left", left.contiguous(), persistent=False)
        self.register_buffer("right", right.contiguous(), persistent=False)


class SvfitLayer(UpdateLayer):
    """y = W x + U ((sigma - s) ⊙ Vᵀ x) + b: W = U diag(s) Vᵀ with other singular values sigma at r places.

    What is trained is the difference sigma - s, or with `relative` (sigma - s) / s, from zero: then the start is exact
    in any type, a small change of a large value is not rounded away, and weight decay pulls towards W. Decay of sigma
    itself would take away the directions of W that matter most.

    By adapter: `svfit_shift` (r), trained, in float32 at least; `svfit_start` (r), the values s, saved to recognise the
    weight by; `svfit_basis`, U and V in the weight's type.
    """

    adapter_layer_names = ("svfit_shift",)
    other_param_names = ("svfit_config", "svfit_start", "svfit_basis")

    def prepare(self) -> None:
        self.svfit_config: dict[str, Any] = {}
        self.svfit_shift = nn.ParameterDict()
        self.svfit_start = BufferDict(persistent=True)
        self.svfit_basis = nn.ModuleDict()

    def build(self, name: str, config: Any) -> None:
        most = min(self.out_features, self.in_features)
        if config.r is not None and config.r > most:
            raise TransectError(
                f"svfit cannot train {config.r} singular values of a weight of {self.out_features} x "
                f"{self.in_features}: it has {most}"
            )
        if self.weight.is_meta:
            raise TransectError("svfit needs the weights themselves, not their shapes: load them before it is added")
        if self.merged:
            raise TransectError("another adapter is merged into the weight: unmerge it before one is added")
        self.svfit_config[name] = config
        self._begin(name, config.r)

    def _begin(self, name: str, count: int | None) -> None:
        """Start an adapter of so many values, or of as many as carry the energy."""
        weight, config = self.weight, self.svfit_config[name]
        left, values, right = decomposed(weight)
        count = enough(values, config.energy) if count is None else count
        places = chosen(count, len(values), config.select, config.seed).to(values.device)
        if ties := tied(values, places):
            warnings.warn(
                f"{ties} of {count} singular values are equal to others or zero, so that their directions are those of "
                "the routine that decomposed the weight: merge the adapter where it was trained",
                stacklevel=2,
            )  # fmt: skip
        kind = torch.promote_types(weight.dtype, torch.float32)
        self.svfit_shift[name] = nn.Parameter(torch.zeros(count, dtype=kind, device=weight.device))
        self.svfit_start[name] = values[places].to(kind)
        self.svfit_basis[name] = Basis(left[:, places].to(weight.dtype), right[places].to(weight.dtype))

    def change(self, name: str) -> Tensor:
        """sigma - s (r)."""
        shift = self.svfit_shift[name]
        return shift * self._start(name) if self.svfit_config[name].relative else shift

    def sigma(self, name: str) -> Tensor:
        """The singular values as they are now (r), of any sign and in any order."""
        return self._start(name) + self.change(name)

    def delta(self, name: str) -> Tensor:
        left, right, change = *self._vectors(name), self.change(name)
        return (left.to(change.dtype) * change) @ right.to(change.dtype)

    def added(self, name: str, x: Tensor) -> Tensor:
        left, right = self._vectors(name)
        inside = functional.linear(x, right) * self.change(name)  # in float32 at least, as are the gradient's sums
        return functional.linear(inside.to(left.dtype), left)

    def _vectors(self, name: str) -> tuple[Tensor, Tensor]:
        basis: Any = self.svfit_basis[name]
        return basis.left, basis.right

    def dtype_of(self, name: str) -> torch.dtype:
        return self._vectors(name)[0].dtype

    def extra_repr(self) -> str:
        most = min(self.out_features, self.in_features)
        return ", ".join(f"{name}: {len(self._start(name))} of {most} singular values" for name in self.svfit_start)

    def _start(self, name: str) -> Tensor:
        start: Any = self.svfit_start[name]
        return start

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """To the device alone: PEFT would round the values to the type of the weight, too."""
        for key in ("svfit_shift", "svfit_start", "svfit_basis"):
            held = getattr(self, key)
            if adapter_name in held and not getattr(held[adapter_name], "is_meta", False):
                held[adapter_name] = held[adapter_name].to(device or self.weight.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """TransectError for numbers of another weight, whose vectors are not those that they were trained with.

        Where the energy chose their count, rounding may have chosen one more or less of them here.
        """
        for name in self.svfit_start:
            given = state_dict.get(f"{prefix}svfit_start.{name}")
            if given is None:
                continue
            by_energy, most = self.svfit_config[name].r is None, min(self.out_features, self.in_features)
            if by_energy and len(given) != len(self._start(name)) and 0 < len(given) <= most:
                self._begin(name, len(given))
            if not _same(given, self._start(name)):
                raise TransectError(
                    f"{prefix.rstrip('.')}: this adapter was trained on another weight, which had other singular "
                    "values: load it on its own base model, in the type that this had then, with nothing merged"
                )
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _same(given: Tensor, start: Tensor) -> bool:
    coarser = max(torch.finfo(given.dtype).eps, torch.finfo(start.dtype).eps)
    far = max(_SAME, 4 * coarser) * start.max()
    return given.shape == start.shape and bool(((given.to(start) - start).abs() <= far).all())
