"""A trained model's memory of a corpus: a network that has learned what its nearest neighbours would say, mixed into
its predictions (MLP Memory, Wei et al., ICLR 2026, arXiv:2508.01832).
"""

from .datastore import Datastore, Targets, neighbours_of, states_of
from .mixture import Memory, attach, memory_of, mixed_loss
from .settings import Settings
from .train import KIND, memorize_anatomy, memory_loss

__all__ = [
    "KIND", "Datastore", "Memory", "Settings", "Targets", "attach", "memorize_anatomy", "memory_loss", "memory_of",
    "mixed_loss", "neighbours_of", "states_of",
]  # fmt: skip
