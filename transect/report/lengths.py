"""What models cost at each length of prompt, beside one that they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .number import in_bytes, in_millions

# Measured at a length (see `transect.evaluation.Quality`) -> heading, and how a value is written.
COSTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "prefill": ("read tok/s", "{:,.0f}".format),
    "decode": ("written tok/s", "{:,.1f}".format),
    "flops": ("FLOPs a token read", "{:.3g}".format),
    "decode_flops": ("FLOPs a token written", "{:.3g}".format),
    "active_parameters": ("parameters for it", in_millions),
    "cache_bytes": ("cache", in_bytes),
}


def costs(measured: Mapping[str, Any], of: Mapping[str, Any] | None) -> list[str]:
    """A cell for each cost; of: the same of the model that it is compared with, for ratios."""
    cells = []
    for key, (_, write) in COSTS.items():
        ratio = f" (x{measured[key] / of[key]:.2f})" if of is not None and of[key] else ""
        cells.append(write(measured[key]) + ratio)
    return cells
