"""Transect: open up a trained transformer, factorize its weight matrices, and keep an ordinary checkpoint.

    import transect
    transect.compress(model, "svd-llm", keep=0.7, data=texts)
    model.save_pretrained("small")

Importing it also lets transformers load what it saved: `AutoModelForCausalLM.from_pretrained("small")`.
"""

from . import ending as _ending  # noqa: F401 - before what takes long
from .modules import importing as _importing

with _importing():
    from . import checkpoint as _checkpoint  # noqa: F401 - registers the loader with transformers
    from .adaptation import adapters
    from .anatomy import Anatomy, register_architecture
    from .compression import allocations, methods
    from .conversion import conversions
    from .editing import edits, undo_folder
    from .errors import BadCheckpoint, BadData, TransectError, UnknownArchitecture
    from .goals import PromptClassifier, objectives
    from .merging import mergings
    from .sizing import searchers
    from .training import layer_rates, optimizers, parametrizations, penalties
    from .verbs import adapt, build, catalogue, check_claims, compare, compress, convert, diff, edit, evaluate, inspect
    from .verbs import memorize, merge, prefer, race, race_parts, recover, search, study  # isort: skip
    from .version import __version__

__all__ = [
    "Anatomy", "BadCheckpoint", "BadData", "PromptClassifier", "TransectError", "UnknownArchitecture", "__version__",
    "adapt", "adapters", "allocations", "build", "catalogue", "check_claims", "compare", "compress",
    "conversions", "convert", "diff", "edit", "edits", "evaluate", "inspect",
    "layer_rates", "memorize", "merge", "mergings", "methods", "objectives", "optimizers", "parametrizations",
    "penalties", "prefer", "race",
    "race_parts", "recover", "register_architecture", "search", "searchers", "study",
    "undo_folder",
]  # fmt: skip
