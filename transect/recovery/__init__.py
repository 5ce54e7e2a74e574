"""A short repair of a model after any compression: LoRA, fine-tuning, or distillation from the dense model.

What is trained is decided in `trained`, and towards what in `blocks` and `recover`; how is the room `training`.
"""

from ..training import Check, Machine, State
from .recover import recover_anatomy
from .settings import How, Settings, Train
from .teacher import check_same_tokens

KIND = "an unfinished repair"  # what the folder of one is

__all__ = ["KIND", "Check", "How", "Machine", "Settings", "State", "Train", "check_same_tokens", "recover_anatomy"]
