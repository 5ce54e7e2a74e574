"""Transformer programs: a constrained transformer is trained on a task and written down as a Python program."""

from . import study  # noqa: F401 - importing it registers it
