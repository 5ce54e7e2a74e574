"""Claims: what the papers say of their methods, as checks that return measured numbers and a verdict.

The claims of a method are one file of `catalog` named after it, or a folder where they need more.
"""

from . import catalog  # noqa: F401 - importing it registers the claims
from .context import Context, Measured
from .registry import Claim, NotApplicable, Result, Verdict, claim, claims
from .run import Outcome, run_claims

__all__ = [
    "Claim", "Context", "Measured", "NotApplicable", "Outcome", "Result", "Verdict", "claim", "claims", "run_claims",
]  # fmt: skip
