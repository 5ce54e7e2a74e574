"""Learning rates by layer, one file each. A file put here is registered; nothing else has to know of it."""

from ...modules import import_all
from .registry import Factors, LayerRates, layer_rates, layer_rates_named, rates_of_layers

import_all(__name__, __path__)

__all__ = ["Factors", "LayerRates", "layer_rates", "layer_rates_named", "rates_of_layers"]
