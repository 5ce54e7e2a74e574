"""Looking into a forward pass of the user's own model, and changing it while it runs."""

from .answers import answer_log_probabilities, next_logits, recitations
from .change import changed
from .lens import Lens
from .points import POINTS, Point, eager_attention
from .specimen import Specimen
from .watch import Seen, watch

__all__ = [
    "POINTS", "Lens", "Point", "Seen", "Specimen", "answer_log_probabilities", "changed", "eager_attention",
    "next_logits", "recitations", "watch",
]  # fmt: skip
