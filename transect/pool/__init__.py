"""Work spread over processes of this machine or a Ray cluster; whatever is lost on the way is tried once more."""

from typing import Literal

from .losses import Losses
from .on_ray import run_on_ray
from .processes import run_in_processes

Engine = Literal["local", "ray"]

__all__ = ["Engine", "Losses", "run_in_processes", "run_on_ray"]
