"""Tasks to train small models on: each makes its own examples, so that a contest needs no data. One file a task."""

from ..modules import import_all
from .registry import Drawn, Task, task, task_named, tasks

import_all(__name__, __path__)

__all__ = ["Drawn", "Task", "task", "task_named", "tasks"]
