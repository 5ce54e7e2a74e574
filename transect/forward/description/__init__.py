"""The self-check of descriptions of architectures."""

from .bench import Check
from .check import check_architecture, check_description

__all__ = ["Check", "check_architecture", "check_description"]
