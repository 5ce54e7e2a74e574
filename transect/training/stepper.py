"""Steps of a registered optimizer over full-precision copies of the trained numbers; its state by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .optimizers import optimizer_named
from .schedule import Schedule


class Stepper:
    """A parameter of less than 32 bits is optimized as a float32 copy and rounded after every step: in bfloat16 itself
    most updates would be lost, as they are smaller than the distance to the next number.

    total: number of steps. rates: factors of the learning rate by the parameter's name; 1 where there is none.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        schedule: Schedule,
        total: int,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        self.parameters, self.schedule, self.total = parameters, schedule, total
        self.masters = {
            name: nn.Parameter(p.detach().float().clone()) if p.element_size() < 4 else p
            for name, p in parameters.items()
        }
        together = self._together(rates or {})
        self.factors = list(together)
        groups = [{"params": named} for named in together.values()]
        self.optimizer = optimizer_named(schedule.optimizer).build(groups, schedule.lr, schedule.options)

    def _together(self, rates: Mapping[str, float]) -> dict[float, list[tuple[str, nn.Parameter]]]:
        """What has the same factor is stepped together."""
        together: dict[float, list[tuple[str, nn.Parameter]]] = {}
        for name, master in self.masters.items():
            together.setdefault(rates.get(name, 1.0), []).append((name, master))
        return together

    def set_rates(self, rates: Mapping[str, float]) -> None:
        """Other factors of the learning rate from now on; what the optimizer holds of each number stays."""
        together = self._together(rates)
        self.factors = list(together)
        own = {k: v for k, v in self.optimizer.param_groups[0].items() if k not in ("params", "param_names")}
        self.optimizer.param_groups[:] = [
            {**own, "params": [one for _, one in named], "param_names": [name for name, _ in named]}
            for named in together.values()
        ]

    @torch.no_grad()
    def step(self, step: int, gradients: Mapping[str, Tensor]) -> None:
        """Take a step along the gradients, of which the norm is limited first."""
        for name, master in self.masters.items():
            master.grad = gradients[name].to(master)
        if self.schedule.clip is not None:
            nn.utils.clip_grad_norm_(self.masters.values(), self.schedule.clip)
        rate = self.schedule.rate(step, self.total)
        for group, factor in zip(self.optimizer.param_groups, self.factors, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step()
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])
            parameter.grad = self.masters[name].grad = None

    @property
    def state_bytes(self) -> int:
        """Of what the optimizer holds besides the numbers."""
        held = [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(value.numel() * value.element_size() for value in held if isinstance(value, Tensor))

    def state(self) -> dict[str, Tensor]:
        """Everything from which `load` goes on, by name."""
        tensors = {f"master|{name}": master.detach() for name, master in self.masters.items()}
        for group, factor in zip(self.optimizer.param_groups, self.factors, strict=True):
            for name in group["param_names"]:
                tensors[f"factor|{name}"] = torch.tensor(factor, dtype=torch.float64)
        for name, master in self.masters.items():
            for key, value in self.optimizer.state[master].items():
                tensors[f"{'tensor' if isinstance(value, Tensor) else 'number'}|{key}|{name}"] = torch.as_tensor(value)
        return tensors

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave: masters, the weights made of them, rates, and what the optimizer held."""
        self.set_rates({name: float(tensors[f"factor|{name}"]) for name in self.masters})
        for name, master in self.masters.items():
            master.copy_(tensors[f"master|{name}"])
            self.parameters[name].copy_(master)
        for label, value in tensors.items():
            kind, _, rest = label.partition("|")
            key, _, name = rest.partition("|")
            if kind in ("tensor", "number") and name in self.masters:
                held: Any = value.item() if kind == "number" else value.to(_place(value, self.masters[name]), copy=True)
                self.optimizer.state[self.masters[name]][key] = held


def _place(value: Tensor, master: Tensor) -> torch.device:
    """Where a state lies: with its number, but for counts of steps, which torch keeps on the CPU."""
    return value.device if value.ndim == 0 else master.device
