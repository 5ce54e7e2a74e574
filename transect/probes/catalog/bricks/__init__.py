"""Bricks: which MLP neurons serve which kind of input, how few are needed, and what breaks without a group."""

from . import bricks  # noqa: F401 - importing it registers it
