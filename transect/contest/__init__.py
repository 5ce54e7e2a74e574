"""A contest of trainings: the same model, data, order and steps; each entrant at its best rate, over several seeds."""

from .architectures import train_architectures
from .plan import Entrant, Plan, Trial
from .race import race_model
from .trials import KIND

__all__ = ["KIND", "Entrant", "Plan", "Trial", "race_model", "train_architectures"]
