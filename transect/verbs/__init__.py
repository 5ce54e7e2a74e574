"""The verbs that a user calls, each a few lines over the rooms."""

from .adapt import adapt
from .build import build
from .catalogue import catalogue
from .claims import check_claims
from .compare import compare
from .compress import compress
from .convert import convert
from .diff import diff
from .edit import edit
from .evaluate import evaluate
from .inspect import inspect
from .memorize import memorize
from .merge import merge
from .prefer import prefer
from .race import race
from .race_parts import race_parts
from .recover import recover
from .search import search
from .study import study

__all__ = [
    "adapt", "build", "catalogue", "check_claims", "compare", "compress", "convert", "diff", "edit", "evaluate",
    "inspect", "memorize", "merge", "prefer", "race", "race_parts", "recover", "search", "study",
]  # fmt: skip
