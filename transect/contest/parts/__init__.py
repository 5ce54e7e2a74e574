"""Fresh models side by side: the same base with one part or another in its slots, at equal size, on a task."""

from .plan import Combination, PartsPlan, PartsTrial, SpeedTrial
from .race import race_parts
from .sizes import built, fitted, flops_of_model
from .worker import check_entrants, size_of_first

__all__ = [
    "Combination", "PartsPlan", "PartsTrial", "SpeedTrial", "built", "check_entrants", "fitted", "flops_of_model",
    "race_parts", "size_of_first",
]  # fmt: skip
