"""The optimizers, one file each. A file put here is registered; nothing else has to know of it."""

from ...modules import import_all
from .registry import Registered, optimizer, optimizer_named, optimizers

import_all(__name__, __path__)

__all__ = ["Registered", "optimizer", "optimizer_named", "optimizers"]
