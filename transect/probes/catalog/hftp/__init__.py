"""Hierarchical frequency tagging: MLP neurons that follow the rhythm of sentences and phrases."""

from . import hftp  # noqa: F401 - importing it registers it
