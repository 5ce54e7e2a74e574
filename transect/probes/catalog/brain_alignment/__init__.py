"""How well a model's layers predict a recording of many channels."""

from . import brain_alignment  # noqa: F401 - importing it registers it
