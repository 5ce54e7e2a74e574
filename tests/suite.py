"""How much is tried: SUITE in the environment is short in `make test`, for two cores have a quarter of an hour.

Then these are left out: the tests that are marked nightly, two thirds of the architectures where a test is asked of all
(conftest.py), every other kill, and half of the paths that make no sense; a command runs either plainly or with all its
options. It is every in `make nightly`, which tries each kill; without it all tests run, with some of the kills.
"""

import os
from typing import TypeVar

T = TypeVar("T")

SHORT = os.environ.get("SUITE") == "short"
EVERY = os.environ.get("SUITE") == "every"


def some(cases: list[T], most: int) -> list[T]:
    """So many of the cases, evenly spread, the last among them; half as many where SUITE is short, all if every."""
    most = max(most // 2, 2) if SHORT else most
    if EVERY or len(cases) <= most:
        return cases
    return [cases[round(i * (len(cases) - 1) / (most - 1))] for i in range(most)]
