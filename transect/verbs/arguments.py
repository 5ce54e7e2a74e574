"""The kinds of arguments that several verbs take; `checked` holds them to these."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch

from ..arguments import FileName as FileName
from ..arguments import FolderName as FolderName
from ..arguments import Kind, Range

MOST = 2**31 - 1

Count = Annotated[int, Range(1, MOST)]
Length = Annotated[int, Range(2, MOST)]  # of a sequence: one token predicts the next
Share = Annotated[float, Range(0, 1, above=True)]
Role = Literal["q", "k", "v", "o", "gate", "up", "down"]


def weight_type(value: Any) -> torch.dtype:
    """A type for weights, or its name; TypeError for anything else."""
    found = getattr(torch, value, None) if isinstance(value, str) else value
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        raise TypeError
    return found


def usable_device(value: Any) -> str:
    """The name of a device that torch can use here; TypeError or ValueError, with torch's reason, for another."""
    if not isinstance(value, (str, torch.device)):
        raise TypeError
    try:
        torch.empty(0, device=value)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(str(error).partition("\n")[0]) from None
    return str(value)


def _sum_type(value: Any) -> torch.dtype:
    if value not in (torch.float32, torch.float64):
        raise TypeError
    return value


def _some(value: list[Any]) -> list[Any]:
    if not value:
        raise ValueError("it is empty")
    return value


WeightType = Annotated[Any, Kind("a type for weights, such as float32, bfloat16 or float16", weight_type)]
SumType = Annotated[torch.dtype, Kind("torch.float32 or torch.float64", _sum_type)]
Device = Annotated[Any, Kind("a device that torch can use here, such as cpu or cuda", usable_device)]
Some = Kind("at least one of them", _some)
