"""SpikingBrain (Pan et al., 2025, arXiv:2509.05276): its attention, its experts, and the codes of its spikes."""

from .attention import SpikingBrain
from .codes import (
    Counted,
    binary_spikes,
    bitwise_planes,
    complement_planes,
    counting,
    from_complement,
    from_planes,
    planes_needed,
    ternary_spikes,
)
from .experts import Upcycled

__all__ = [
    "Counted", "SpikingBrain", "Upcycled", "binary_spikes", "bitwise_planes", "complement_planes", "counting",
    "from_complement", "from_planes", "planes_needed", "ternary_spikes",
]  # fmt: skip
