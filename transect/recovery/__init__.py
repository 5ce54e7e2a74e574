"""A short repair of a model after any compression: LoRA, fine-tuning, or distillation from the dense model.

What is trained is decided in `trained`, towards what in `objectives` and `blocks`, and how in `loop`. Everything is
written beside its place as it goes, so that an interrupted repair goes on bit for bit (`state`).
"""

from .loop import Check
from .machine import Machine
from .recover import recover_anatomy
from .settings import How, Settings, Train
from .state import State
from .teacher import check_same_tokens

__all__ = ["Check", "How", "Machine", "Settings", "State", "Train", "check_same_tokens", "recover_anatomy"]
