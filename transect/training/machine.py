"""Where a training runs: the device and the processes, as accelerate has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from ..errors import TransectError

_ALIKE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class Machine:
    """One process on the CPU or a GPU, or several under `accelerate launch`, each with a whole copy of the model.

    The processes share out the sequences of every batch and add up their gradients, so that all take the same step.
    device: in place of the one that accelerate chooses; for a single process.
    """

    def __init__(self, device: str | torch.device | None = None) -> None:
        try:
            self.accelerator = Accelerator()
        except (ValueError, ImportError) as reason:  # of variables and settings that mean nothing to it, or not here
            raise TransectError(
                f"accelerate does not take what its settings, or variables such as ACCELERATE_MIXED_PRECISION, say: "
                f"{reason}"
            ) from reason
        if self.accelerator.distributed_type not in _ALIKE:
            raise TransectError(
                f"training runs as plain processes, each with the whole model, not under "
                f"{self.accelerator.distributed_type.value}: choose multi-GPU or multi-CPU in accelerate's config"
            )
        self.precision: str = self.accelerator.mixed_precision or "no"  # of an empty variable, too
        if self.precision not in ("no", "bf16"):
            raise TransectError(f"mixed precision {self.precision!r} needs scaled losses; use bf16 or no")
        self.index: int = self.accelerator.process_index
        self.count: int = self.accelerator.num_processes
        if device is not None and self.count > 1:
            raise TransectError("with several processes accelerate gives each its device: leave device out")
        self.device = self.accelerator.device if device is None else torch.device(device)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.accelerator.is_main_process

    def to_dict(self) -> dict[str, Any]:
        """What of it decides the numbers of a training, as JSON; the same in every process."""
        return {"device": self.device.type, "processes": self.count, "mixed_precision": self.precision}

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, where the tensor was."""
        if self.count == 1:
            return tensor
        summed: Any = self.accelerator.reduce(tensor.to(self.device), reduction="sum")
        return summed.to(tensor.device)

    def autocast(self) -> Any:
        """Mixed precision, where accelerate is told to use it."""
        return self.accelerator.autocast()

    def wait(self) -> None:
        """Until every process has come here."""
        self.accelerator.wait_for_everyone()


@contextmanager
def on_device(machine: Machine, models: Sequence[Any]) -> Iterator[None]:
    """Inside the `with` the models are on the machine's device."""
    moved = [(model, model.device) for model in models if model.device != machine.device]
    try:
        for model, _ in moved:
            model.to(machine.device)
        yield
    finally:
        for model, device in moved:
            model.to(device)
