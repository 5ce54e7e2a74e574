"""Turning a trained model into another architecture that keeps its weights: a file for each method in `catalog`.

A conversion is where a part's numbers come from: exactly where algebra allows it, repaired by the one training loop
where it does not.
"""

from . import catalog  # noqa: F401 - importing one registers it
from .convert import KIND, Plan, convert_anatomy
from .registry import Calibration, Conversion, conversion, conversion_named, conversions
from .stage import Stage

__all__ = [
    "KIND", "Calibration", "Conversion", "Plan", "Stage", "conversion", "conversion_named", "conversions",
    "convert_anatomy",
]  # fmt: skip
