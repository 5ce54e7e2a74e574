"""S-KAN (Yang et al. 2024, arXiv:2408.08338): the parts, and the phases of their training."""

from .part import KANLayer, SelectableActivation, SelectableKAN
from .phases import Keep, entropy, prune, set_temperature

__all__ = ["KANLayer", "Keep", "SelectableActivation", "SelectableKAN", "entropy", "prune", "set_temperature"]
