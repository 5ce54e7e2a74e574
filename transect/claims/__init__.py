"""Claims: what the papers say of their methods, as checks that return measured numbers and a verdict.

One file a method; a file put here registers its claims, nothing else has to list it.
"""

from ..modules import import_all
from .context import Context, Measured
from .registry import Claim, NotApplicable, Result, Verdict, claim, claims
from .run import Outcome, run_claims

import_all(__name__, __path__)

__all__ = [
    "Claim", "Context", "Measured", "NotApplicable", "Outcome", "Result", "Verdict", "claim", "claims", "run_claims",
]  # fmt: skip
