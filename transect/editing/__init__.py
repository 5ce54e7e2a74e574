"""Closed-form and other small edits of weights, each with a card of what changed and the way back.

One file an edit in `catalog`; a file put there registers its edit.
"""

from . import catalog  # noqa: F401 - importing an edit registers it
from .card import Card
from .journal import Journal
from .registry import Edit, edit, editing, edits
from .run import Edited, edit_specimen, undo_folder
from .stack import Entry, listed, read_stack

__all__ = [
    "Card", "Edit", "Edited", "Entry", "Journal", "edit", "edit_specimen", "editing", "edits", "listed", "read_stack",
    "undo_folder",
]  # fmt: skip
