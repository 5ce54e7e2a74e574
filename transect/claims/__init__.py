"""Claims: what the papers say of their methods, as checks that return measured numbers and a verdict.

One file a method; a new one is imported here, which registers its claims.
"""

from . import fwsvd, kfac_svd, svd_llm  # noqa: F401 - importing a file registers its claims
from .context import Context, Measured
from .registry import Claim, NotApplicable, Result, Verdict, claim, claims
from .run import Outcome, run_claims

__all__ = [
    "Claim", "Context", "Measured", "NotApplicable", "Outcome", "Result", "Verdict", "claim", "claims", "run_claims",
]  # fmt: skip
