"""The one training loop: what is lowered, which numbers change, how steps are taken, where it runs.

Everything is written beside its place as it goes, so that an interrupted training goes on bit for bit (`state`).
"""

from .loop import Check, Course, OnCheck, Parameters, Problem, Run, train
from .machine import Machine, on_device
from .objectives import distance_from, held_out_loss, own_loss
from .optimizers import optimizer, optimizer_named, optimizers
from .parametrizations import Parametrization, Parametrized, parametrization, parametrization_named, parametrizations
from .penalties import Penalty, Seen, penalties, penalty, penalty_named
from .rates import LayerRates, layer_rates, layer_rates_named, rates_of_layers
from .schedule import Schedule, Shape
from .state import State
from .stepper import Stepper
from .watched import watching

__all__ = [
    "Check", "Course", "LayerRates", "Machine", "OnCheck", "Parameters", "Parametrization", "Parametrized", "Penalty",
    "Problem", "Run", "Schedule", "Seen", "Shape", "State", "Stepper", "distance_from", "held_out_loss", "layer_rates",
    "layer_rates_named", "on_device", "optimizer", "optimizer_named", "optimizers", "own_loss", "parametrization",
    "parametrization_named", "parametrizations", "penalties", "penalty", "penalty_named", "rates_of_layers", "train",
    "watching",
]  # fmt: skip
