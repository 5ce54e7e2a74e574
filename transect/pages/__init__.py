"""One page a method: what it does, its paper, its parameters, what its paper claims and what was measured."""

from .entries import COMMANDS, PURPOSES, entries
from .site import KIND, write_site

__all__ = ["COMMANDS", "KIND", "PURPOSES", "entries", "write_site"]
