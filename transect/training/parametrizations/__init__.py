"""Other numbers for a linear layer while it is trained, one file or folder each; nothing else has to know of them."""

from ...modules import import_all
from .host import Parametrized
from .registry import Parametrization, parametrization, parametrization_named, parametrizations
from .stand_in import StandIn, Together

import_all(__name__, __path__)

__all__ = [
    "Parametrization", "Parametrized", "StandIn", "Together", "parametrization", "parametrization_named",
    "parametrizations",
]  # fmt: skip
