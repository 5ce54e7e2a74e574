"""Running the user's own model: what it predicts, what can be watched and changed meanwhile, and single blocks."""

from .answers import answer_log_probabilities, next_logits, recitations
from .blocks import Call, Feed, feeds_of, predictions_after, run_block, run_blocks
from .change import changed
from .check import Check, check_architecture, check_description
from .lens import Lens
from .objective import Batch, predictions, summed_loss, task_of, to_device
from .points import POINTS, Point, eager_attention
from .watch import Seen, watch

__all__ = [
    "POINTS", "Batch", "Call", "Check", "Feed", "Lens", "Point", "Seen", "answer_log_probabilities", "changed",
    "check_architecture", "check_description", "eager_attention", "feeds_of", "next_logits", "predictions",
    "predictions_after", "recitations", "run_block", "run_blocks", "summed_loss", "task_of", "to_device", "watch",
]  # fmt: skip
