"""Data: text files and the like in, batches of model inputs out.

`load` makes `Batches` for a model from whatever the user has; `Batches` is what statistics and evaluation iterate over.
"""

from .batches import Batches
from .facts import load_choices, load_facts, load_passages
from .loading import LONGEST, SpecialTokens, load, load_rows
from .preferences import Preference, load_preferences
from .questions import Choice, Fact, Passage
from .specimen import Specimen

__all__ = [
    "LONGEST",
    "Batches",
    "Choice",
    "Fact",
    "Passage",
    "Preference",
    "SpecialTokens",
    "Specimen",
    "load",
    "load_choices",
    "load_facts",
    "load_passages",
    "load_preferences",
    "load_rows",
]
