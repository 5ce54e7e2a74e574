"""Numbers as they are read."""

import math
from typing import Any


def in_a_cell(value: Any) -> str:
    """A table's entry: four digits of a float, a gap for what is no number, yes or no, or the text itself."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def in_bytes(value: float) -> str:
    """A number of bytes: 12.29 KB."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1000
    raise AssertionError


def in_millions(value: float) -> str:
    """A large number: 134.52 M."""
    return f"{value / 1e6:,.2f} M"
