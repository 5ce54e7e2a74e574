"""Running the user's own model: what it predicts, what can be watched and changed meanwhile, and single blocks."""

from .answers import answer_log_probabilities, continuations, next_logits, recitations
from .behind import Behind
from .blocks import Call, Feed, feeds_of, put_out, run_at, run_block, run_blocks, stopping_behind
from .change import changed
from .description import Check, check_architecture, check_description
from .head import backpropagate, last_logits, logits_at, scored
from .lens import Lens
from .mode import at_rest
from .objective import Batch, inputs_of, predictions, real_positions, run_body, summed_loss, task_of, to_device
from .past import agree, first_of, run_and_keep
from .points import POINTS, Point, eager_attention
from .states import with_states_of
from .watch import Seen, watch
from .wide import computing_wide

__all__ = [
    "POINTS",
    "Batch",
    "Behind",
    "Call",
    "Check",
    "Feed",
    "Lens",
    "Point",
    "Seen",
    "agree",
    "answer_log_probabilities",
    "at_rest",
    "backpropagate",
    "changed",
    "check_architecture",
    "check_description",
    "computing_wide",
    "continuations",
    "eager_attention",
    "feeds_of",
    "first_of",
    "inputs_of",
    "last_logits",
    "logits_at",
    "next_logits",
    "predictions",
    "put_out",
    "real_positions",
    "recitations",
    "run_and_keep",
    "run_at",
    "run_block",
    "run_blocks",
    "run_body",
    "scored",
    "stopping_behind",
    "summed_loss",
    "task_of",
    "to_device",
    "watch",
    "with_states_of",
]  # fmt: skip
