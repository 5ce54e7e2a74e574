"""Layers to train: drop-in replacements whose trained form is an ordinary operator, so that it saves and loads."""

from .masa import share_attention, store_coefficients
from .monarch import MonarchLinear

__all__ = ["MonarchLinear", "share_attention", "store_coefficients"]
