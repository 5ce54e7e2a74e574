"""Sparse dictionaries of a model's activations: trained by the one loop, kept in SAELens' layout, spliced in."""

from .activations import Activations, counted, numbered
from .dictionary import Dictionary
from .folder import KIND, folder_of, hook_name, layer_of, read_dictionary, write_dictionary
from .settings import Settings
from .spliced import Principal, pinned, recovered, spliced_losses
from .train import train_dictionary

__all__ = [
    "KIND", "Activations", "Dictionary", "Principal", "Settings", "counted", "folder_of", "hook_name", "layer_of",
    "numbered", "pinned", "read_dictionary", "recovered", "spliced_losses", "train_dictionary", "write_dictionary",
]  # fmt: skip
