"""Searching a model's sizes inside the model itself: every smaller one is a slice of it.

A space (`space`) says which sizes there are, a method in `catalog` picks one network, and `cut` takes it out.
"""

from . import catalog as _catalog  # noqa: F401 - registers the methods
from .registry import Searcher, searcher, searchers, searching
from .run import search_anatomy
from .settings import Settings
from .space import Axis, Space, default_sizes, space_of
from .super_network import SuperNetwork
from .task import Found, Task

__all__ = [
    "Axis", "Found", "Searcher", "Settings", "Space", "SuperNetwork", "Task", "default_sizes", "search_anatomy",
    "searcher", "searchers", "searching", "space_of",
]  # fmt: skip
