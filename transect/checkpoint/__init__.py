"""Save and load changed models through the ordinary Hugging Face calls."""

from .attach import attach
from .folder import check_folder
from .open import Opened, open_model
from .replay import replay
from .save import save

attach()

__all__ = ["Opened", "attach", "check_folder", "open_model", "replay", "save"]
