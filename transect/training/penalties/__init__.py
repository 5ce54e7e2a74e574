"""What may be added to the loss, one file each. A file put here is registered; nothing else has to know of it."""

from ...modules import import_all
from .registry import Penalty, Seen, penalties, penalty, penalty_named

import_all(__name__, __path__)

__all__ = ["Penalty", "Seen", "penalties", "penalty", "penalty_named"]
