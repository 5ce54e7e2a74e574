"""What a training lowers: from the user's data to a loss, one file or folder each in `catalog`."""

from .catalog.mvp import PromptClassifier
from .goal import ExampleGoal, Goal, Reading
from .registry import Objective, objective, objective_named, objectives

__all__ = [
    "ExampleGoal",
    "Goal",
    "Objective",
    "PromptClassifier",
    "Reading",
    "objective",
    "objective_named",
    "objectives",
]
